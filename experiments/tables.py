"""Make the tables of the documents from results.jsonl: python -m experiments.tables [--check]

A document says where a table goes with a comment, `<!-- ladder: RECIPE ... -->` to `<!-- ladder end -->`; what is between the two is
replaced. A row is a recipe under one protocol, a column a subset (empty where it was not asked): pass@1 of the model, its controls
behind it. The value is the mean over seeds, the interval reaches from the lowest to the highest bound of the seeds' own 95 %
intervals. Recipes without results are named below the table.
"""

import re
import sys
from pathlib import Path

from experiments.ladder import CONTROLS, METRICS, RESULTS, ROOT, Ladder, Result, read_ladder, read_results
from utils.arguments import parser_of
from utils.errors import UserError, reports_user_errors
from utils.files import write_atomically

PLACE = re.compile(r"(<!-- ladder: (.*?) -->\n).*?(<!-- ladder end -->)", re.DOTALL)


def table(names: list[str], ladder: Ladder, results: list[Result]) -> str:
    """Markdown rows of recipes, and the names of those without results."""
    rows = {
        (name, protocol): [
            r for r in results if (r.recipe, r.protocol, r.metric) == (name, protocol, METRICS[0])
        ]
        for name in names
        for protocol in ladder.recipe(name).subsets
    }
    measured = {row: own for row, own in rows.items() if own}
    subsets = list(
        dict.fromkeys(
            subset for name, protocol in measured for subset in ladder.recipe(name).subsets[protocol]
        )
    )
    lines = [
        "| recipe | protocol | " + " | ".join(subsets) + " | seeds | training s |",
        "|---" * (len(subsets) + 4) + "|",
    ]
    for (name, protocol), own in measured.items():
        seconds = {result.seeds[0]: result.wall_seconds for result in own}
        cells = [_cell([result for result in own if result.split == subset]) for subset in subsets]
        mean = f"{sum(seconds.values()) / len(seconds):.0f}"
        row = [
            f"`{name}`: {ladder.recipes[name].title}",
            protocol.replace("_", " "),
            *cells,
            str(len(seconds)),
            mean,
        ]
        lines.append(f"| {' | '.join(row)} |")
    missing = [f"`{name}`, {protocol.replace('_', ' ')}" for name, protocol in rows.keys() - measured.keys()]
    if missing:
        lines += ["", f"Not measured: {'; '.join(sorted(missing))}."]
    return "\n".join(lines) + "\n"


def _cell(results: list[Result]) -> str:
    """The model's score with its interval and n, then the controls in the order of `CONTROLS`."""
    by_control = {control: [r for r in results if r.control == control] for control in ("none", *CONTROLS)}
    if not by_control["none"]:
        return ""
    means = [f"{sum(r.value for r in of) / len(of):.3f}" if of else "-" for of in by_control.values()]
    own = by_control["none"]
    low, high = min(r.ci_low for r in own), max(r.ci_high for r in own)
    return f"{means[0]} [{low:.3f}, {high:.3f}], n {own[0].n}; {', '.join(means[1:])}"


def fill(text: str, ladder: Ladder, results: list[Result]) -> str:
    """A document with its tables made anew."""
    return PLACE.sub(lambda found: f"{found[1]}{table(found[2].split(), ladder, results)}{found[3]}", text)


@reports_user_errors
def main() -> None:
    parser = parser_of("experiments.tables", __doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit status 1 when a table is not up to date"
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    ladder, results = read_ladder(), read_results(options.results)
    documents = [
        path
        for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
        if PLACE.search(path.read_text())
    ]
    if not documents:
        raise UserError(
            "no document has a place for a table, <!-- ladder: RECIPE ... --> to <!-- ladder end -->"
        )
    stale = [path for path in documents if fill(path.read_text(), ladder, results) != path.read_text()]
    for path in stale:
        print(f"{path.relative_to(ROOT)}: {'not up to date' if options.check else 'written'}")
        if not options.check:
            text = fill(path.read_text(), ladder, results)
            write_atomically(path, lambda temporary, text=text: temporary.write_text(text))
    sys.exit(1 if options.check and stale else 0)


if __name__ == "__main__":
    main()
