"""Look into checkpoints, compare them, average them, and take over those of other systems.

    python -m tools.checkpoint inspect runs/first
    python -m tools.checkpoint diff runs/first runs/second
    python -m tools.checkpoint average runs/first/checkpoints/step_900 runs/second --output runs/mean
    python -m tools.checkpoint convert step_518071 --output runs/original --data data/arc1-puzzle

inspect and diff also read files of the original TRM, HRM, the first ETRM and nano-trm; convert makes them
checkpoints. docs/sharing.md says more.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

if not __package__:  # called by its path: import from the project's folder, not from this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from models.foreign import read_foreign
from models.pretrained import trained_config
from tools import checkpoint_diff
from tools.checkpoint_convert import convert
from utils import checkpoint
from utils.arguments import parser_of
from utils.distributed import World
from utils.errors import UserError, reports_user_errors
from utils.files import as_json, sha256_of

SHOWN = 12  # tensors of a terminal's table; --json has them all


def statistics(value: Tensor) -> dict[str, Any]:
    """A tensor's shape and type, mean, deviation and range of its finite numbers, and how many are not."""
    # In double precision, where no sum of half-precision weights overflows.
    finite = value.double()[value.isfinite()] if value.is_floating_point() else value.double()
    known = finite.numel() > 0
    return {
        "shape": list(value.shape),
        "dtype": str(value.dtype).removeprefix("torch."),
        "mean": finite.mean().item() if known else None,
        "std": finite.std(correction=0).item() if known else None,
        "min": finite.min().item() if known else None,
        "max": finite.max().item() if known else None,
        "not_finite": value.numel() - finite.numel(),
    }


def inspect(path: Path) -> dict[str, Any]:
    """What is in a checkpoint or in another system's file, as JSON values. Raises `UserError`."""
    weights: dict[str, dict[str, Tensor]]
    if path.is_file():
        foreign = read_foreign(path)
        weights = {"raw" if foreign.averaged else "the file's": foreign.weights}
        weights |= {"ema": foreign.averaged} if foreign.averaged else {}
        about: dict[str, Any] = {
            "path": str(path),
            "kind": f"a file of {foreign.kind}",
            "game": foreign.game,
            "settings": foreign.settings,
        }
    else:
        path = checkpoint.resolve(path)
        info = checkpoint.load_info(path)
        about = {
            "path": str(path),
            "kind": "a checkpoint of this framework",
            "damage": checkpoint.damage(path) or None,
        }
        about |= {key: value for key, value in info.items() if key != "sha256"}
        about["files"] = {file.name: file.stat().st_size for file in sorted(path.iterdir())}
        present = [which for which, name in checkpoint.WEIGHTS.items() if (path / name).is_file()]
        # A damaged checkpoint is refused by whatever loads it.
        weights = {}
        if not about["damage"]:
            weights = {which: checkpoint.load_weights(path, which) for which in present}
    about["weights"] = {
        which: {name: statistics(value) for name, value in sorted(tensors.items())}
        for which, tensors in weights.items()
    }
    return about


def lines_of(about: dict[str, Any]) -> list[str]:
    """What `inspect` found, for a terminal."""
    lines = [f"{about['path']}: {about['kind']}"]
    if "step" in about:  # a checkpoint of this framework
        config, data = about["config"], about["data"]
        encoder = (config["encoder"] or {}).get("name", "none")
        model = f"arch {config['arch']['name']}, encoder {encoder}"
        files = ", ".join(f"{name} {size:,} bytes" for name, size in about["files"].items())
        lines += [
            f"step {about['step']}, {model}, {about['optimizer']}",
            f"data {data['path']} ({data['layout']}, {data['protocol']})",
            f"code {about['git_commit']}, torch {about['torch']}, {about['device']}",
            f"files: {files}",
            f"damage: {about['damage'] or 'none'}",
        ]
        if origin := about.get("converted_from"):
            lines.append(f"converted from {origin['path']}, a file of {origin['kind']}, {origin['sha256']}")
        for one in about.get("average_of", []):
            # Means made by older versions hold the paths alone.
            lines.append(
                f"mean of {one['path']} ({one['weights']})" if isinstance(one, dict) else f"mean of {one}"
            )
    elif about["settings"]:
        settings = ", ".join(f"{key} {value}" for key, value in about["settings"].items())
        lines.append(f"vocabulary of {about['game'] or 'no game'}; {settings}")
    for which, tensors in about["weights"].items():
        lines += ["", *_table(which, tensors)]
    return lines


def _table(which: str, tensors: dict[str, dict[str, Any]]) -> list[str]:
    """The lines of one kind of weights: totals, tensors that are not finite, the largest tensors."""
    count = sum(int(np.prod(found["shape"])) for found in tensors.values())
    broken = {name: found["not_finite"] for name, found in tensors.items() if found["not_finite"]}
    lines = [f"{which} weights: {len(tensors)} tensors, {count:,} numbers, {sum(broken.values())} not finite"]
    lines += [f"  {name}: {number} not finite" for name, number in broken.items()]
    lines.append(f"  {'tensor':<44}{'shape':<16}{'mean':>11}{'std':>11}{'min':>11}{'max':>11}")
    largest = sorted(tensors, key=lambda name: -np.prod(tensors[name]["shape"]))[:SHOWN]
    for name in largest:
        found = tensors[name]
        shape = "x".join(map(str, found["shape"])) or "one"
        values = [found[key] for key in ("mean", "std", "min", "max")]
        numbers = "".join(f"{'-':>11}" if value is None else f"{value:>11.4g}" for value in values)
        lines.append(f"  {name:<44}{shape:<16}{numbers}")
    if len(tensors) > SHOWN:
        lines.append(f"  and {len(tensors) - SHOWN} smaller ones; --json shows them")
    return lines


def average(paths: list[Path], output: Path, which: str | None = None) -> Path:
    """Write the mean of several checkpoints of one model as a checkpoint in `output`, and return its path.

    which: raw or ema; None: of each checkpoint what an evaluation would use. Optimizers and carries have no
    mean and are left out: the result can be evaluated, asked and started from, but not resumed. Its
    `average_of` says of what it is the mean. Raises `UserError` for checkpoints of different models.
    """
    found = [checkpoint.resolve(path) for path in paths]
    infos = [checkpoint.load_info(path) for path in found]
    for path, info in zip(found[1:], infos[1:], strict=True):
        for part in ("arch", "encoder"):
            if trained_config(info)[part] != trained_config(infos[0])[part]:
                raise UserError(f"{path} is another model than {found[0]}: their settings of {part} differ")
        if info["sizes"] != infos[0]["sizes"]:
            raise UserError(f"{path} was trained on data of other sizes than {found[0]}")
    kinds = [which or checkpoint.best_kind(path) for path in found]
    weights = [checkpoint.load_weights(path, kind) for path, kind in zip(found, kinds, strict=True)]
    mean = {name: _mean([tensors[name] for tensors in weights]) for name in weights[0]}
    # What any of them has seen, the mean has seen.
    pairs = np.unique(np.concatenate([checkpoint.load_trained_pairs(path) for path in found]))
    last = max(infos, key=lambda info: info["step"])
    # `save` writes the first four anew, and the scores are of other weights.
    own = ("format", "step", "world_size", "sha256", "scores")
    info = {key: value for key, value in last.items() if key not in own}
    info |= {"scores": {}, "average_of": [_origin(*one) for one in zip(found, infos, kinds, strict=True)]}
    shared = {"trained_pairs": torch.from_numpy(pairs.view(np.int64))}
    content = checkpoint.Content({"raw": {}, "ema": mean}, shared, {}, info)
    return checkpoint.save(output / "checkpoints", last["step"], World(), content, checkpoint.Keep(newest=1))


def _origin(path: Path, info: dict[str, Any], which: str) -> dict[str, Any]:
    """Where one of the averaged weights is from."""
    return {
        "path": str(path),
        "step": info["step"],
        "weights": which,
        "sha256": sha256_of(path / checkpoint.WEIGHTS[which]),
        "seed": info["config"].get("seed"),
        "git_commit": info["git_commit"],
    }


def _mean(values: list[Tensor]) -> Tensor:
    """The mean of one tensor over the checkpoints. Raises `UserError` for whole numbers that differ."""
    if values[0].is_floating_point():
        # In double precision, so that the order of the checkpoints does not matter.
        return torch.stack([value.double() for value in values]).mean(0).to(values[0].dtype)
    if not all(torch.equal(value, values[0]) for value in values):
        raise UserError("a tensor of whole numbers differs between the checkpoints and has no mean")
    return values[0]


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = parser_of("tools.checkpoint", __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    a_path = "a checkpoint, a run, or another system's file"
    looking = commands.add_parser("inspect", help="what a checkpoint holds")
    looking.add_argument("path", type=Path, help=a_path)
    comparing = commands.add_parser("diff", help="what two checkpoints differ in")
    comparing.add_argument("paths", type=Path, nargs=2, metavar="path", help=a_path)
    averaging = commands.add_parser("average", help="the mean of several checkpoints")
    averaging.add_argument("paths", type=Path, nargs="+", metavar="path", help="checkpoints or runs")
    taking = commands.add_parser("convert", help="another system's file as a checkpoint")
    taking.add_argument("path", type=Path, help="a file of the original TRM, HRM, the first ETRM or nano-trm")
    data = "a dataset, with whose puzzles the rows of the file are matched by name"
    taking.add_argument("--data", type=Path, metavar="FOLDER", help=data)
    encoder = "of a first ETRM only the recursion, beside a new encoder"
    taking.add_argument("--fresh-encoder", metavar="NAME", help=encoder)
    settings = "of the model, where the file does not tell"
    taking.add_argument("--overrides", nargs="*", default=[], metavar="KEY=VALUE", help=settings)
    for command in (looking, comparing):
        command.add_argument("--json", action="store_true", help="everything, as JSON")
    for command in (comparing, averaging):
        which = "which weights (default: averaged ones, if there are any)"
        command.add_argument("--weights", choices=list(checkpoint.WEIGHTS), help=which)
    for command in (averaging, taking):
        command.add_argument("--output", type=Path, required=True, help="a run folder to be made")
    return parser.parse_args()


@reports_user_errors
def main() -> None:
    options = parse_arguments()
    if options.command == "inspect":
        about = inspect(options.path)
        print(json.dumps(as_json(about), indent=1) if options.json else "\n".join(lines_of(about)))
        found = [statistic for tensors in about["weights"].values() for statistic in tensors.values()]
        broken = any(statistic["not_finite"] for statistic in found)
        if broken or about.get("damage"):
            sys.exit(2)
    elif options.command == "diff":
        both = [checkpoint_diff.held(path, options.weights) for path in options.paths]
        found = checkpoint_diff.diff(*both)
        print(
            json.dumps(as_json(found), indent=1)
            if options.json
            else "\n".join(checkpoint_diff.lines_of(found))
        )
    elif options.command == "convert":
        encoder = options.fresh_encoder
        path = convert(options.path, options.output, options.data, encoder, options.overrides)
        print(f"{path}: python evaluate.py checkpoint={options.output}")
    else:
        if len(options.paths) < 2:
            raise UserError("an average takes at least two checkpoints")
        path = average(options.paths, options.output, options.weights)
        print(f"{path}: the mean of {len(options.paths)} checkpoints")


if __name__ == "__main__":
    main()
