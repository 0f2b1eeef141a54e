"""Writing a dataset of puzzles that share one rule (the layout `pairs`)."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from dataset.games import GAMES, Game
from dataset.store import BLANK_IDENTIFIER, FORMAT, SPLITS, Metadata
from dataset.writer import Packed, SplitName

Splits = Mapping[SplitName, tuple[np.ndarray, np.ndarray]]


def pack(
    splits: Splits,
    *,
    game: str,
    source: str,
    seed: int,
    num_aug: int,
    details: Mapping[str, Any],
    fingerprints: Mapping[SplitName, np.ndarray],
) -> Packed:
    """A dataset of puzzles that share one rule.

    splits: inputs and answers of each split, both (n, rows, columns) uint8.
    num_aug: number of symmetric copies of each training puzzle that `data.augmentation=table` draws from.
        They are a function of the seed (`Game.stored_symmetries`) and take no space.
    fingerprints: (n,) uint64 of each split, equal for puzzles that a symmetry of the game maps to each other.
    details: what else is said of the puzzles. `labels` names the rule by which the answers break ties, where
        they do.
    """
    arrays = _arrays(splits, fingerprints)
    total, side = len(arrays["task_ids"]), max(arrays["grids"].shape[1:])
    of_game = GAMES[game].of_side(side)
    if of_game.tie_break is not None and details.get("labels") == of_game.tie_break.name:
        _add_turned_answers(arrays, of_game)
    table: dict[str, np.ndarray] = {
        "task_rows": np.arange(total + 1),
        "dihedral": np.zeros(total, np.uint8),
        "colours": of_game.identity_colours(total),
    }
    metadata = Metadata(
        format=FORMAT,
        game=game,
        layout="pairs",
        protocol="inductive",
        source=source,
        seed=seed,
        num_aug=num_aug,
        max_grid_size=side,
        subsets={name: len(inputs) for name, (inputs, _) in splits.items()},
        test_subsets=["test"],
        identifiers_start=1,
        num_puzzle_identifiers=1,
        augmentations_per_task={},
        leaks=[],
        left_out={},
        details=dict(details),
        sha256={},
    )
    return Packed(arrays, table, {"identifiers.json": [BLANK_IDENTIFIER]}, metadata)


def _add_turned_answers(arrays: dict[str, np.ndarray], game: Game) -> None:
    """Add the answers to every turned and mirrored puzzle, where they are not the turned answers.

    They are stored turned back, so that they are drawn like any answer.
    """
    grids, inputs = arrays["grids"], arrays["grids"][arrays["pair_input"]]
    pairs = len(inputs)
    turned = [game.turned_answers(inputs, index) for index in range(1, 8)]
    new = len(grids) + np.arange(7 * pairs, dtype=np.int32).reshape(7, pairs)
    arrays["grids"] = np.concatenate([grids, *turned])
    arrays["shapes"] = np.tile(arrays["shapes"][:1], (len(arrays["grids"]), 1))
    arrays["pair_turned"] = np.stack([arrays["pair_output"], *new], axis=1)


def _arrays(splits: Splits, fingerprints: Mapping[SplitName, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays of tasks.npz for puzzles: each is a task of one query and no demonstration."""
    counts = {name: len(inputs) for name, (inputs, _) in splits.items()}
    total = sum(counts.values())
    inputs, answers = (np.concatenate([pair[role] for pair in splits.values()]) for role in (0, 1))
    pairs = np.arange(total, dtype=np.int32)
    prints = np.concatenate([fingerprints[name] for name in counts])
    arrays: dict[str, np.ndarray] = {
        "grids": np.stack([inputs, answers], axis=1).reshape(2 * total, *inputs.shape[1:]),
        "shapes": np.tile(np.array(inputs.shape[1:], np.uint8), (2 * total, 1)),
        "pair_input": 2 * pairs,
        "pair_output": 2 * pairs + 1,
        "pair_fingerprint": prints | np.uint64(1),  # 0 stands for an unknown answer
        "task_pairs": np.arange(total + 1),
        "task_demonstrations": np.zeros(total, np.int32),
        "task_split": np.concatenate(
            [np.full(count, SPLITS[name], np.uint8) for name, count in counts.items()]
        ),
        "task_subset": np.repeat(np.arange(len(counts), dtype=np.int32), list(counts.values())),
        "task_ids": np.array([f"{name}_{i:07d}" for name, count in counts.items() for i in range(count)]),
        "subset_names": np.array(list(counts)),
    }
    return arrays
