"""Check that a score of an evaluation is what a recipe promises.

    python -m experiments.check runs/rules-smoke-memory/evaluation ARC/pass@1 --min 0.95

Prints the score with its interval. The exit status is 1 when the score is outside of --min to --max.
"""

import sys
from pathlib import Path

if not __package__:  # called by its path: import from the project's folder, not from this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from utils.arguments import parser_of
from utils.errors import UserError, reports_user_errors
from utils.files import read_json


@reports_user_errors
def main() -> None:
    parser = parser_of("experiments.check", __doc__)
    add = parser.add_argument
    add("folder", type=Path, help="an evaluation's folder, with results.json")
    add("metric", help="for example ARC/pass@1")
    add("--control", default="none", help="none (the model) or a control's name")
    add("--min", type=float, default=0.0, help="default: %(default)s")
    add("--max", type=float, default=1.0, help="default: %(default)s")
    options = parser.parse_args()
    results = read_json(options.folder / "results.json")
    try:
        found = [
            s for s in results["scores"] if s["metric"] == options.metric and s["control"] == options.control
        ]
        who, protocol = results["model"]["encoder"] or results["model"]["arch"], results["protocol"]
    except (KeyError, TypeError):  # another program's file, or an older one
        raise UserError(f"{options.folder}/results.json was not written by an evaluation") from None
    if not found:
        raise UserError(
            f"{options.folder}/results.json has no {options.metric} for control {options.control}"
        )
    (score,) = found  # an evaluation has one score per metric and control
    good = options.min <= score["value"] <= options.max
    interval = f"[{score['ci_low']:.3f}, {score['ci_high']:.3f}], n {score['n']}, {protocol}"
    promise = f"expected {options.min:g} to {options.max:g}"
    name = "model" if options.control == "none" else options.control
    verdict = "ok  " if good else "FAIL"
    print(f"{verdict} {who}, {name}: {options.metric} {score['value']:.3f} {interval}; {promise}")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
