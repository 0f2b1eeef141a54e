"""Share a trained model of a run: as a small run folder, or on the Hugging Face hub.

    python -m tools.publish runs/demo pretrained/demo
    python -m tools.publish runs/demo hub:owner/name
    python -m tools.publish runs/demo shared/demo --layout hub

A shared model consists of

- the averaged weights and the configuration of the run's newest checkpoint;
- the fingerprints of the pairs that it was trained on, by which a later evaluation tells what the model has
  seen;
- the scores of the run's evaluations.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

if not __package__:  # called by its path: import from the project's folder, not from this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from safetensors.torch import save_file

from tools.model_card import model_card, training_command
from utils import checkpoint, hub
from utils.arguments import parser_of
from utils.errors import UserError, reports_user_errors
from utils.extras import require
from utils.files import directory_written_whole, read_json, sha256_of, write_json

WEIGHTS, PAIRS = checkpoint.WEIGHTS["ema"], "trained_pairs.pt"
FILES = (WEIGHTS, PAIRS)
MOST_BYTES = 8 * 10**6  # of a small model
DESCRIPTION = "scores.json"
CARD = "README.md"
TOLD = ("protocol", "adaptation", "split", "subsets", "num_views", "seed", "dataset", "scores")
LICENCE = "mit"  # the project's own, LICENSE


def publish(run: Path, output: Path) -> int:
    """Write the model of a run to the folder `output`, a run folder, and return its size in bytes.

    Raises `UserError` for a run without evaluations, or a model that is too large.
    """
    source, info, evaluations = found_in(run)
    size = sum((source / name).stat().st_size for name in (*FILES, checkpoint.INFO))
    if size > MOST_BYTES:
        raise UserError(
            f"{source}: {size / 1e6:.1f} MB are more than the {MOST_BYTES / 1e6:.0f} MB of a small model; "
            "--layout hub takes any size"
        )
    with directory_written_whole(output, marker=DESCRIPTION) as folder:
        target = folder / "checkpoints" / source.name
        target.parent.mkdir(parents=True)
        # Its digests are of these files alone.
        checkpoint.assemble(target, {name: source / name for name in FILES}, info)
        about = {"git_commit": info["git_commit"], "data": info["data"], "parameters": info["parameters"]}
        sums = {name: sha256_of(target / name) for name in (checkpoint.INFO, *FILES)}
        write_json(folder / DESCRIPTION, {**about, "sha256": sums, "evaluations": evaluations}, indent=1)
    return size


def found_in(run: Path) -> tuple[Path, dict[str, Any], list[dict[str, Any]]]:
    """The checkpoint of a run or of a shared model, its info.json, and evaluations of its averaged weights.

    Raises `UserError` for a run without any.
    """
    source = checkpoint.resolve(run)
    if not (source / WEIGHTS).is_file():
        raise UserError(f"{source} has no averaged weights, and others are not shared")
    shared = sha256_of(source / WEIGHTS)
    # A run may have evaluations of older checkpoints, or of the weights before averaging.
    results = [read_json(path) for path in sorted((run / "evaluations").glob("*/results.json"))]
    found = [
        {key: about[key] for key in TOLD} for about in results if about["checkpoint"]["sha256"] == shared
    ]
    if not found and (run / DESCRIPTION).is_file():
        before = read_json(run / DESCRIPTION)
        found = before["evaluations"] if before["sha256"][WEIGHTS] == shared else []
    if not found:
        raise UserError(
            f"{run}: no evaluation of {source.name} with averaged weights; a model is shared with its scores"
        )
    return source, checkpoint.load_info(source), found


def save_pretrained(run: Path, folder: Path, name: str, licence: str = LICENCE) -> None:
    """Write the model of a run to `folder` in the layout of the hub (utils/hub.py), with the card of `name`.

    Raises `UserError` for a run without evaluations.
    """
    source, info, evaluations = found_in(run)
    command = training_command(run)
    info = without_folders({key: value for key, value in info.items() if key != "sha256"})
    with directory_written_whole(folder, marker=hub.CONFIG) as target:
        shutil.copyfile(source / WEIGHTS, target / hub.WEIGHTS)
        pairs = torch.from_numpy(checkpoint.load_trained_pairs(source).view(np.int64).copy())
        save_file({"trained_pairs": pairs}, target / hub.PAIRS)
        about = {
            "model_type": "etrm",
            "etrm_format": checkpoint.SHARED_FORMAT,
            "arch": info["config"]["arch"],
            "encoder": info["config"]["encoder"],
            "sha256": {file: sha256_of(target / file) for file in (hub.WEIGHTS, hub.PAIRS)},
            "info": info,
        }
        write_json(target / hub.CONFIG, about, indent=1)
        evaluations = without_folders(evaluations)
        write_json(target / DESCRIPTION, {"evaluations": evaluations}, indent=1)
        card = model_card(name, info, evaluations, command, licence)
        (target / CARD).write_text(card, encoding="utf-8")


def push_to_hub(
    run: Path, repository: str, message: str | None = None, licence: str = LICENCE, **options: Any
) -> str:
    """Push the model of a run to `owner/name`, and return the commit.

    options: private, token, branch and create_pr, as in `PyTorchModelHubMixin.push_to_hub`.
    Raises `UserError` for a run without evaluations, or where the hub refuses.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        save_pretrained(run, folder, repository, licence)
        return hub.push(folder, repository, message or f"The model of {run.name}", **options)


def without_folders(value: Any) -> Any:
    """`value` with the last part alone of every absolute path: the others' folders are nobody's business."""
    if isinstance(value, dict):
        return {key: without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_folders(item) for item in value]
    return Path(value).name if isinstance(value, str) and value.startswith("/") else value


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = parser_of("tools.publish", __doc__)
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="the folder of an evaluated run, or of a shared model")
    add("output", metavar="OUTPUT", help="the folder to write, or hub:owner/name")
    add("--layout", choices=("run", "hub"), default="run", help="of the folder (default: %(default)s)")
    add("--name", help="owner/name on the card of a folder in the layout of the hub")
    add("--licence", default=LICENCE, help="of the weights, as the hub calls it (default: %(default)s)")
    add("--message", help="of the commit on the hub")
    add("--branch", help="of the hub's repository; it is made where it is missing")
    add("--private", action="store_true", default=None, help="make a new repository of the hub a private one")
    add("--create-pr", action="store_true", help="push to a pull request of the hub")
    return parser.parse_args()


@reports_user_errors
def main() -> None:
    options = parse_arguments()
    if hub.is_reference(options.output):
        require("huggingface_hub", "pushing to the hub")
        repository, revision = hub.name_of(options.output)
        if revision:
            raise UserError(
                f"{options.output}: a commit gets its revision when it is made; --branch names one"
            )
        told = {key: getattr(options, key) for key in ("private", "branch", "create_pr")}
        commit = push_to_hub(options.run, repository, options.message, options.licence, **told)
        where = f"{hub.PREFIX}{repository}@{commit}"
        print(f"{where}; python evaluate.py checkpoint={where}")
    elif options.layout == "hub":
        output = Path(options.output)
        save_pretrained(options.run, output, options.name or output.resolve().name, options.licence)
        print(f"{output}; python evaluate.py checkpoint={hub.PREFIX}{output}")
    else:
        size = publish(options.run, Path(options.output))
        print(f"{options.output}: {size / 1e6:.1f} MB; python evaluate.py checkpoint={options.output}")


if __name__ == "__main__":
    main()
