"""Hold an evaluation against what a recipe promises: python -m experiments.check FOLDER METRIC [--control C] [--min X] [--max Y]

Prints the score with its interval; exit status 1 when it is outside.
"""

import sys
from pathlib import Path

from utils.arguments import parser_of
from utils.errors import UserError, reports_user_errors
from utils.files import read_json


@reports_user_errors
def main() -> None:
    parser = parser_of("experiments.check", __doc__)
    parser.add_argument("folder", type=Path, help="an evaluation's folder, with results.json")
    parser.add_argument("metric", help="for example ARC/pass@1")
    parser.add_argument("--control", default="none", help="none (the model) or a control's name")
    parser.add_argument("--min", type=float, default=0.0)
    parser.add_argument("--max", type=float, default=1.0)
    options = parser.parse_args()
    results = read_json(options.folder / "results.json")
    try:
        found = [
            s for s in results["scores"] if s["metric"] == options.metric and s["control"] == options.control
        ]
        who, protocol = results["model"]["encoder"] or results["model"]["arch"], results["protocol"]
    except (KeyError, TypeError):
        raise UserError(f"{options.folder}/results.json was not written by an evaluation") from None
    if not found:
        raise UserError(
            f"{options.folder}/results.json has no {options.metric} for control {options.control}"
        )
    (score,) = found
    good = options.min <= score["value"] <= options.max
    interval = f"[{score['ci_low']:.3f}, {score['ci_high']:.3f}], n {score['n']}, {protocol}"
    promise = f"expected {options.min:g} to {options.max:g}"
    name = "model" if options.control == "none" else options.control
    print(
        f"{'ok  ' if good else 'FAIL'} {who}, {name}: {options.metric} {score['value']:.3f} {interval}; {promise}"
    )
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
