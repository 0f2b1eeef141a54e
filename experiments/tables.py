"""Make the tables of the documents from results.jsonl.

    python -m experiments.tables --check

A document marks a table's place with two comments, `<!-- ladder: RECIPE ... -->` and `<!-- ladder end -->`;
the command replaces what is between them. A row is a recipe under one protocol, a column is a subset. A cell
holds pass@1 of the model, followed by its controls; it is empty where the subset was not asked. The value is
the mean over seeds. The interval reaches from the lowest to the highest bound of the seeds' own 95 %
intervals. Recipes without results are named below the table.
"""

import re
import sys
from pathlib import Path

if not __package__:  # called by its path: import from the project's folder, not from this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from experiments.ladder import CONTROLS, METRICS, RESULTS, ROOT, Ladder, Result, read_ladder, read_results
from utils.arguments import parser_of
from utils.errors import UserError, reports_user_errors
from utils.files import write_atomically

PLACE = re.compile(r"(<!-- ladder: (.*?) -->\n).*?(<!-- ladder end -->)", re.DOTALL)


def table(names: list[str], ladder: Ladder, results: list[Result]) -> str:
    """The table of the recipes `names` in Markdown, and a line with those that have no results."""
    rows = {
        (name, protocol): [
            r for r in results if (r.recipe, r.protocol, r.metric) == (name, protocol, METRICS[0])
        ]
        for name in names
        for protocol in ladder.recipe(name).subsets
    }
    measured = {row: own for row, own in rows.items() if own}
    asked = (subset for name, protocol in measured for subset in ladder.recipe(name).subsets[protocol])
    subsets = list(dict.fromkeys(asked))  # without repetition, in the order of the recipes
    lines = [
        "| recipe | protocol | " + " | ".join(subsets) + " | seeds | training s |",
        "|---" * (len(subsets) + 4) + "|",
    ]
    for (name, protocol), own in measured.items():
        # All scores of a seed come from one training.
        seconds = {result.seeds[0]: result.wall_seconds for result in own}
        cells = [_cell([result for result in own if result.split == subset]) for subset in subsets]
        title = f"`{name}`: {ladder.recipes[name].title}"
        mean = f"{sum(seconds.values()) / len(seconds):.0f}"
        row = [title, protocol.replace("_", " "), *cells, str(len(seconds)), mean]
        lines.append(f"| {' | '.join(row)} |")
    missing = [f"`{name}`, {protocol.replace('_', ' ')}" for name, protocol in rows.keys() - measured.keys()]
    if missing:
        lines += ["", f"Not measured: {'; '.join(sorted(missing))}."]
    return "\n".join(lines) + "\n"


def _cell(results: list[Result]) -> str:
    """The model's score with its interval and n, then the scores of `CONTROLS`; empty without results."""
    by_control = {control: [r for r in results if r.control == control] for control in ("none", *CONTROLS)}
    if not by_control["none"]:
        return ""
    means = [f"{sum(r.value for r in of) / len(of):.3f}" if of else "-" for of in by_control.values()]
    own = by_control["none"]
    # The widest of the seeds' intervals: a seed's own one says nothing of other seeds.
    low, high = min(r.ci_low for r in own), max(r.ci_high for r in own)
    return f"{means[0]} [{low:.3f}, {high:.3f}], n {own[0].n}; {', '.join(means[1:])}"


def fill(text: str, ladder: Ladder, results: list[Result]) -> str:
    """The text of a document with its tables made anew."""
    return PLACE.sub(lambda found: f"{found[1]}{table(found[2].split(), ladder, results)}{found[3]}", text)


@reports_user_errors
def main() -> None:
    parser = parser_of("experiments.tables", __doc__)
    check = "write nothing; exit status 1 when a table is not up to date"
    parser.add_argument("--check", action="store_true", help=check)
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"default: experiments/{RESULTS.name}")
    options = parser.parse_args()
    ladder, results = read_ladder(), read_results(options.results)
    # Read once: a table is stale if filling the text changes it.
    texts = {path: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
    filled = {path: fill(text, ladder, results) for path, text in texts.items() if PLACE.search(text)}
    if not filled:
        raise UserError(
            "no document has a place for a table, <!-- ladder: RECIPE ... --> to <!-- ladder end -->"
        )
    stale = {path: text for path, text in filled.items() if text != texts[path]}
    for path, text in stale.items():
        print(f"{path.relative_to(ROOT)}: {'not up to date' if options.check else 'written'}")
        if not options.check:
            write_atomically(path, lambda temporary, text=text: temporary.write_text(text))
    sys.exit(1 if options.check and stale else 0)


if __name__ == "__main__":
    main()
