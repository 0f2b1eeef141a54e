"""A page of training samples: what enters the model, beside the tasks as they are stored."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from dataset import augment
from dataset.batch import DataConfig, Samples, materialise
from dataset.samplers import SAMPLERS
from dataset.store import TEST, Store
from tools.info_text import MEANING
from utils.files import json_in_page, write_atomically

TEMPLATE = Path(__file__).with_name("info_template.html")
PLACEHOLDER = "__INFO_DATA__"  # where the template has its data


def sample_cards(source: Store, config: DataConfig, count: int, seed: int) -> Iterable[dict[str, Any]]:
    """The first `count` training samples of a run with this seed and a batch size of 1, as the page shows
    them.

    Grids are lists of side * side tokens, as `materialise` makes them. Labels are -100 where nothing is
    learned. Raises `UserError` where no training task fits.
    """
    sampler = SAMPLERS[source.metadata.layout](source, config, seed, 1)
    for step in range(count):
        yield _card(source, sampler.sample(step))


def _card(source: Store, samples: Samples) -> dict[str, Any]:
    """A batch of one sample, and its task as it is stored."""
    batch = materialise(samples, source, source.grid_table)
    tokens = {name: tensor.tolist() for name, tensor in batch.data.items()}
    # A sample knows its pairs; the task is the one whose range of pairs holds them.
    task = int(np.searchsorted(source.task_pairs, samples.query[0], side="right")) - 1
    first_pair = int(source.task_pairs[task])
    grids = source.task(task)
    return {
        "task": grids.id,
        "subset": source.subset_names[source.task_subset[task]],
        "split": "test" if source.task_split[task] == TEST else "train",
        "name": grids.id if source.layout.shares_rule else _name_of_view(grids.id, samples),
        "identifier": tokens["puzzle_identifiers"][0],
        "side": samples.bucket.side,
        "offset": samples.offset[0].tolist(),
        "transform": int(samples.transform[0]),
        "colours": samples.colours[0].tolist(),
        "order": None if samples.order is None else samples.order[0].tolist(),
        "demonstrations": [
            {
                "pair": int(pair) - first_pair,
                "input": tokens["demo_inputs"][0][number],
                "label": tokens["demo_labels"][0][number],
            }
            for number, pair in enumerate(samples.demos[0])
        ],
        "query": {
            "pair": int(samples.query[0]) - first_pair,
            "input": tokens["inputs"][0],
            "label": tokens["labels"][0],
        },
        "stored_demonstrations": len(grids.demonstrations),
        "stored": [
            [grid if grid is None else grid.tolist() for grid in (pair.input, pair.output)]
            for pair in grids.pairs
        ],
    }


def _name_of_view(task_id: str, samples: Samples) -> str:
    """The name of the sample's augmentation of its task; the task's own where nothing is changed."""
    transform, colours = samples.transform[0], samples.colours[0]
    if not transform and (colours == augment.IDENTITY_COLOURS).all():
        return task_id
    # `names_of` names the task itself first, then its augmentations.
    transforms = np.array([0, transform], np.uint8)
    return augment.names_of(task_id, transforms, np.stack([augment.IDENTITY_COLOURS, colours]))[1]


def write_page(path: Path, source: Store, config: DataConfig, count: int, seed: int) -> None:
    """Write `count` samples as one page that a browser opens without a network."""
    metadata, vocabulary = source.metadata, source.game.vocabulary
    data = {
        "dataset": {
            "path": str(source.path),
            "hash": metadata.content_hash,
            "layout": f"{metadata.layout}: {MEANING[metadata.layout]}",
            "protocol": f"{metadata.protocol}: {MEANING[metadata.protocol]}",
        },
        "game": source.game.to_page(metadata.max_grid_size),
        "first": vocabulary.first,
        "eos": vocabulary.eos,
        "seed": seed,
        "settings": config.model_dump(exclude={"path"}),
        "samples": list(sample_cards(source, config, count, seed)),
    }
    page = TEMPLATE.read_text(encoding="utf-8").replace(PLACEHOLDER, json_in_page(data))
    write_atomically(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))
