"""The model card of a shared model: what its checkpoint and its evaluations hold, with the hub's metadata."""

import re
import shlex
from pathlib import Path
from typing import Any

import yaml

from dataset.layouts import LAYOUTS
from utils.files import read_json

NOT_RECORDED = "not recorded"
TASKS = {"arc": "ARC tasks", "sudoku": "Sudoku", "maze": "mazes"}


def model_card(
    name: str, info: dict[str, Any], evaluations: list[dict[str, Any]], command: str | None, licence: str
) -> str:
    """The card of the model `owner/name`.

    info: info.json of its checkpoint. evaluations: as in scores.json. command: of its training.
    """
    arch, encoder = info["config"]["arch"], info["config"]["encoder"]
    parameters = {part.replace("_", " "): number for part, number in info["parameters"].items() if number}
    size = ", ".join(f"{part} {number:,}" for part, number in parameters.items())
    data = info["data"]
    what = f"{arch['name']} with the encoder {encoder['name']}" if encoder else arch["name"]
    sections = [
        f"# {name.rsplit('/', 1)[-1]}",
        f"A tiny recursive model ({what}) of {TASKS.get(data['game'], data['game'])}: {size}, "
        f"averaged weights after {info['step']:,} training steps.",
        "## Scores",
        *(_scores(evaluation) for evaluation in evaluations),
        "Intervals are 95 % Wilson intervals over n tasks. Scores under different protocols are not "
        "comparable.",
        "## Use",
        _fenced(*_use(name, bool(encoder) or LAYOUTS[data["layout"]].shares_rule)),
        "## Training",
        _table(("what", "value"), _training(info, command)),
        f"Licence: {licence}.",
    ]
    return f"---\n{_metadata(name, info, evaluations, licence)}---\n\n" + "\n\n".join(sections) + "\n"


def training_command(run: Path) -> str | None:
    """The command that began a run, with the last part of absolute paths; None where its folder does not
    say."""
    file = run / "environment.json"
    starts = read_json(file) if file.is_file() else []
    if not starts:
        return None
    words = []
    for word in shlex.split(starts[0]["command"]):
        words.append(
            re.sub(r"(^|[=\[,'\"])(/[^,\]'\"]+)", lambda found: found[1] + Path(found[2]).name, word)
        )
    return f"python {shlex.join(words)}"


def _metadata(name: str, info: dict[str, Any], evaluations: list[dict[str, Any]], licence: str) -> str:
    """What the hub reads of a card, in YAML."""
    results = []
    for evaluation in evaluations:
        metrics = [
            {"type": score["metric"], "value": round(score["value"], 4), "name": score["metric"]}
            for score in evaluation["scores"]
            if score["control"] == "none"
        ]
        dataset = evaluation["dataset"]
        about = {"name": _asked(evaluation), "type": info["data"]["game"], "revision": dataset["sha256"]}
        results.append({"task": {"type": "abstract-reasoning"}, "dataset": about, "metrics": metrics})
    tags = ["tiny-recursive-model", "arc-agi", info["config"]["arch"]["name"], "model_hub_mixin"]
    index = [{"name": name.rsplit("/", 1)[-1], "results": results}]
    card = {"license": licence, "library_name": "etrm", "tags": tags, "model-index": index}
    return yaml.safe_dump(card, sort_keys=False, allow_unicode=True)


def _asked(evaluation: dict[str, Any]) -> str:
    """What was asked, in a few words."""
    subsets = f" {', '.join(evaluation['subsets'])}" if evaluation["subsets"] else ""
    return f"{Path(evaluation['dataset']['path']).name}, split {evaluation['split']}{subsets}"


def _scores(evaluation: dict[str, Any]) -> str:
    """The scores of one evaluation, with its controls."""
    rows = [
        (
            "model" if score["control"] == "none" else score["control"],
            score["metric"],
            f"{100 * score['value']:.1f} %",
            f"[{100 * score['ci_low']:.1f}, {100 * score['ci_high']:.1f}]",
            str(score["n"]),
        )
        for score in evaluation["scores"]
        if score["n"]
    ]
    dataset = evaluation["dataset"]
    how = f"{_asked(evaluation)}: protocol {evaluation['protocol']}, {evaluation['num_views']} views, "
    how += f"seed {evaluation['seed']}, dataset SHA-256 {dataset['sha256']}"
    return f"{how}\n\n" + _table(("asked", "metric", "score", "95 % interval", "n"), rows)


def _use(name: str, can_be_asked: bool) -> list[str]:
    reference = f"hub:{name}@REVISION"
    asked = f"python predict.py checkpoint={reference} task=FILE"
    return [f"python evaluate.py checkpoint={reference}", *([asked] if can_be_asked else [])]


def _training(info: dict[str, Any], command: str | None) -> list[tuple[str, str]]:
    data = info["data"]
    found = [
        ("command", f"`{command}`" if command else NOT_RECORDED),
        ("code", f"commit {info['git_commit']}" if info["git_commit"] else NOT_RECORDED),
        ("seed", str(info["config"].get("seed"))),
        ("data", f"{Path(data['path']).name}, {data['layout']}, {data.get('protocol', NOT_RECORDED)}"),
        ("data SHA-256", f"`{data['hash']}`"),
        ("optimiser", info.get("optimizer", NOT_RECORDED)),
        ("ran on", f"{info.get('device', NOT_RECORDED)}, torch {info.get('torch', NOT_RECORDED)}"),
    ]
    if origin := info.get("converted_from"):
        found.append(("converted from", f"a file of {origin['kind']}, SHA-256 `{origin['sha256']}`"))
    for one in (one for one in info.get("average_of", []) if isinstance(one, dict)):  # once these were paths
        found.append(("mean of", f"step {one['step']}, seed {one['seed']}, SHA-256 `{one['sha256']}`"))
    return found


def _table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [heads, tuple("---" for _ in heads), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _fenced(*lines: str) -> str:
    return "\n".join(["```", *lines, "```"])
