"""The layouts of a dataset: how a model gets to know a task. Every difference between them is a field here.

A new layout needs a row here, a sampler (dataset/samplers.py), a builder that writes it, and a line in
docs/datasets.md.
"""

from dataclasses import dataclass
from typing import Literal

LayoutName = Literal["puzzle", "fewshot", "pairs"]


@dataclass(frozen=True)
class Layout:
    """One way of getting to know a task.

    meaning: one line for the readers of a dataset's description.
    learns_rows: every augmented puzzle has a learned row. Then the evaluation tasks' demonstrations are
        training data.
    reads_demonstrations: a model is shown a task's demonstrations.
    shares_rule: all puzzles follow one rule. Each is a task of its own without demonstrations.
    unknown: why a model cannot be asked a task that it was not trained on. None: it can.
    """

    name: LayoutName
    meaning: str
    learns_rows: bool = False
    reads_demonstrations: bool = False
    shares_rule: bool = False
    unknown: str | None = None


LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout(
            "puzzle",
            "a learned row per augmented puzzle; the evaluation tasks' demonstrations are training data",
            learns_rows=True,
            unknown="knows each task by a row that was learned for it, and an unknown task has none",
        ),
        Layout(
            "fewshot",
            "a model knows a task only from its demonstrations; "
            "evaluation tasks occur in no form in training",
            reads_demonstrations=True,
        ),
        Layout(
            "pairs",
            "every pair is a task of its own, without demonstrations and without a row of its own",
            shares_rule=True,
        ),
    )
}
