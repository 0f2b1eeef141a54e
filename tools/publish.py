"""Make a small trained model of a run, to be shared: python -m tools.publish RUN OUTPUT

What is kept: the averaged weights and the configuration of the newest checkpoint, the fingerprints of the pairs that it was trained on,
by which an evaluation tells later what it has seen, and the scores of the run's evaluations. OUTPUT is a run folder like any other:
evaluate.py, predict.py and Solver.from_pretrained read it.
"""

import shutil
from pathlib import Path

from utils import checkpoint
from utils.arguments import parser_of
from utils.errors import UserError, reports_user_errors
from utils.files import directory_written_whole, read_json, sha256_of, write_json

FILES = ("info.json", checkpoint.WEIGHTS["ema"], "trained_pairs.pt")
MOST_BYTES = 8 * 10**6
DESCRIPTION = "scores.json"


def publish(run: Path, output: Path) -> int:
    """Write OUTPUT and return its size in bytes. Raises `UserError` for a run without evaluations or a model that is too large."""
    source = checkpoint.resolve(run)
    size = sum((source / name).stat().st_size for name in FILES)
    if size > MOST_BYTES:
        raise UserError(
            f"{source}: {size / 1e6:.1f} MB are more than the {MOST_BYTES / 1e6:.0f} MB of a small model"
        )
    found = [read_json(path) for path in sorted((run / "evaluations").glob("*/results.json"))]
    evaluations = [
        {
            key: about[key]
            for key in (
                "protocol",
                "adaptation",
                "split",
                "subsets",
                "num_views",
                "seed",
                "dataset",
                "scores",
            )
        }
        for about in found
        if about["checkpoint"]["sha256"] == sha256_of(source / FILES[1])
    ]
    if not evaluations:
        raise UserError(
            f"{run}: no evaluation of {source.name} with averaged weights; a model is shared with its scores"
        )
    with directory_written_whole(output, marker=DESCRIPTION) as folder:
        target = folder / "checkpoints" / source.name
        target.mkdir(parents=True)
        for name in FILES:
            shutil.copyfile(source / name, target / name)
        info = checkpoint.load_info(source)
        about = {"git_commit": info["git_commit"], "data": info["data"], "parameters": info["parameters"]}
        sums = {name: sha256_of(target / name) for name in FILES}
        write_json(folder / DESCRIPTION, {**about, "sha256": sums, "evaluations": evaluations}, indent=1)
    return size


@reports_user_errors
def main() -> None:
    parser = parser_of("tools.publish", __doc__)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("output", type=Path, metavar="OUTPUT")
    options = parser.parse_args()
    size = publish(options.run, options.output)
    print(f"{options.output}: {size / 1e6:.1f} MB; python evaluate.py checkpoint={options.output}")


if __name__ == "__main__":
    main()
