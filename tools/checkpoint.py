"""Look into checkpoints, or average several: python -m tools.checkpoint inspect PATH | average PATH PATH ...
--output FOLDER

inspect   What a checkpoint holds: step, configuration, statistics of every tensor, numbers that are not
          finite, damage. PATH is a checkpoint or run folder, or a file of the original TRM or HRM.
average   The mean of the weights of several checkpoints of one model, as a checkpoint to evaluate and to ask.

    python -m tools.checkpoint inspect runs/first python -m tools.checkpoint average
    runs/first/checkpoints/step_900 runs/first/checkpoints/step_1000 --output runs/mean
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.pretrained import load_original
from utils import checkpoint
from utils.arguments import parser_of
from utils.distributed import World
from utils.errors import UserError, reports_user_errors
from utils.files import as_json

SHOWN = 12  # tensors of a terminal's table; --json has them all


def statistics(value: Tensor) -> dict[str, Any]:
    """Shape, type, mean, deviation and range over the finite numbers of a tensor, and how many are not
    finite."""
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
    """What is in a checkpoint or in an original's file, as JSON values. Raises `UserError`."""
    if path.is_file():
        weights = {"the file's": load_original(path)}
        about: dict[str, Any] = {"path": str(path), "kind": "a state dict of the original TRM or HRM"}
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
        weights = (
            {} if about["damage"] else {which: checkpoint.load_weights(path, which) for which in present}
        )
    about["weights"] = {
        which: {name: statistics(value) for name, value in sorted(tensors.items())}
        for which, tensors in weights.items()
    }
    return about


def lines_of(about: dict[str, Any]) -> list[str]:
    """What `inspect` found, for a terminal."""
    lines = [f"{about['path']}: {about['kind']}"]
    if "step" in about:
        config = about["config"]
        encoder = (config["encoder"] or {}).get("name", "none")
        lines.append(
            f"step {about['step']}, arch {config['arch']['name']}, encoder {encoder}, {about['optimizer']}"
        )
        lines.append(f"data {about['data']['path']} ({about['data']['layout']}, {about['data']['protocol']})")
        lines.append(f"code {about['git_commit']}, torch {about['torch']}, {about['device']}")
        lines.append("files: " + ", ".join(f"{name} {size:,} bytes" for name, size in about["files"].items()))
        lines.append(f"damage: {about['damage'] or 'none'}")
    for which, tensors in about["weights"].items():
        count = sum(int(np.prod(found["shape"])) for found in tensors.values())
        broken = {name: found["not_finite"] for name, found in tensors.items() if found["not_finite"]}
        lines += [
            "",
            f"{which} weights: {len(tensors)} tensors, {count:,} numbers, {sum(broken.values())} not finite",
        ]
        lines += [f"  {name}: {number} not finite" for name, number in broken.items()]
        lines.append(f"  {'tensor':<44}{'shape':<16}{'mean':>11}{'std':>11}{'min':>11}{'max':>11}")
        largest = sorted(tensors, key=lambda name: -np.prod(tensors[name]["shape"]))[:SHOWN]
        for name in largest:
            found = tensors[name]
            numbers = "".join(
                "          -" if found[key] is None else f"{found[key]:>11.4g}"
                for key in ("mean", "std", "min", "max")
            )
            lines.append(f"  {name:<44}{'x'.join(map(str, found['shape'])) or 'one':<16}{numbers}")
        if len(tensors) > SHOWN:
            lines.append(f"  and {len(tensors) - SHOWN} smaller ones; --json shows them")
    return lines


def average(paths: list[Path], output: Path) -> Path:
    """Write the mean of the evaluated weights of several checkpoints of one model as a checkpoint in
    `output`.

    The weights are the averaged ones where a checkpoint has them. What has no meaning of a mean, optimisers
    and carries, is left out: the result can be evaluated, asked and started from, but not resumed. Raises
    `UserError`.
    """
    found = [checkpoint.resolve(path) for path in paths]
    infos = [checkpoint.load_info(path) for path in found]
    for path, info in zip(found[1:], infos[1:], strict=True):
        for part in ("arch", "encoder"):
            if info["config"][part] != infos[0]["config"][part]:
                raise UserError(f"{path} is another model than {found[0]}: their settings of {part} differ")
        if info["sizes"] != infos[0]["sizes"]:
            raise UserError(f"{path} was trained on data of other sizes than {found[0]}")
    weights = [checkpoint.load_weights(path, _best_kind(path)) for path in found]
    mean = {name: _mean([tensors[name] for tensors in weights]) for name in weights[0]}
    pairs = np.unique(np.concatenate([checkpoint.load_trained_pairs(path) for path in found]))
    last = max(infos, key=lambda info: info["step"])
    info = {
        key: value
        for key, value in last.items()
        if key not in ("format", "step", "world_size", "sha256", "scores")
    }
    info |= {"average_of": [str(path) for path in found], "scores": {}}
    shared = {"trained_pairs": torch.from_numpy(pairs.view(np.int64))}
    content = checkpoint.Content({"raw": {}, "ema": mean}, shared, {}, info)
    return checkpoint.save(output / "checkpoints", last["step"], World(), content, checkpoint.Keep(newest=1))


def _best_kind(path: Path) -> str:
    return "ema" if (path / checkpoint.WEIGHTS["ema"]).is_file() else "raw"


def _mean(values: list[Tensor]) -> Tensor:
    """In double precision, so that the order of the checkpoints does not matter; what is no number has to be
    the same."""
    if values[0].is_floating_point():
        return torch.stack([value.double() for value in values]).mean(0).to(values[0].dtype)
    if not all(torch.equal(value, values[0]) for value in values):
        raise UserError("a tensor of whole numbers differs between the checkpoints and has no mean")
    return values[0]


@reports_user_errors
def main() -> None:
    parser = parser_of("tools.checkpoint", __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    looking = commands.add_parser(
        "inspect", help="what a checkpoint holds", formatter_class=argparse.HelpFormatter
    )
    looking.add_argument("path", type=Path)
    looking.add_argument("--json", action="store_true", help="everything, as JSON")
    averaging = commands.add_parser("average", help="the mean of several checkpoints")
    averaging.add_argument("paths", type=Path, nargs="+", metavar="path")
    averaging.add_argument("--output", type=Path, required=True, help="a run folder to be made")
    options = parser.parse_args()
    if options.command == "inspect":
        about = inspect(options.path)
        print(json.dumps(as_json(about), indent=1) if options.json else "\n".join(lines_of(about)))
        broken = any(
            found["not_finite"] for tensors in about["weights"].values() for found in tensors.values()
        )
        if broken or about.get("damage"):
            sys.exit(2)
        return
    if len(options.paths) < 2:
        raise UserError("an average takes at least two checkpoints")
    print(f"{average(options.paths, options.output)}: the mean of {len(options.paths)} checkpoints")


if __name__ == "__main__":
    main()
