"""Drives an ancestor's own builder and loader.

    PYTHONPATH=CHECKOUT python drive.py {build,read,rate} OPTIONS

OPTIONS are the function's arguments as JSON. It runs in a process of its own, because the ancestors' packages
have the names of ours.
"""

import importlib
import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

WARM_UP = 16  # batches, twice what the loader fetches ahead
EPOCHS_PER_ITERATION = 1000


def build(module: str, **config: Any) -> None:
    """Build a dataset with the ancestor's builder."""
    builder = importlib.import_module(module)
    builder.convert_dataset(builder.DataProcessConfig(**config))


def dataset(loader: str, data: str, split: str, batch_size: int, epochs: int) -> Any:
    """The ancestor's iterable dataset, of the class named `module:class`, over the folder `data`."""
    module, name = loader.split(":")
    code = importlib.import_module(module)
    config = getattr(code, name + "Config")(
        seed=0,
        dataset_paths=[data],
        global_batch_size=batch_size,
        test_set_mode=split == "test",
        epochs_per_iter=epochs,
        rank=0,
        num_replicas=1,
    )
    return getattr(code, name)(config, split=split)


def read(output: str, **named: Any) -> None:
    """Write all that one epoch shows as arrays to `output`, without the padding of the last batch."""
    batches = [
        {name: values[:size].numpy() for name, values in batch.items()} | {"set": np.full(size, set_name)}
        for set_name, batch, size in dataset(epochs=1, **named)
    ]
    np.savez(output, **{name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]})


def rate(seconds: float, device: str, **named: Any) -> None:
    """Print training examples per second, with the settings of the ancestors' training scripts."""
    import torch  # not above: the builder does not need it, and its memory is measured
    from torch.utils.data import DataLoader

    loader = DataLoader(
        dataset(split="train", epochs=EPOCHS_PER_ITERATION, **named),
        batch_size=None,
        num_workers=1,
        prefetch_factor=8,
        pin_memory=device != "cpu",
        persistent_workers=True,
    )

    def sizes() -> Iterator[int]:
        while True:
            for _, batch, size in loader:
                for values in batch.values():
                    values.to(device)
                yield size

    stream = sizes()
    # What the worker has fetched ahead would count as infinitely fast.
    for _ in range(WARM_UP):
        next(stream)
    count, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        count += next(stream)
    if device != "cpu":
        torch.cuda.synchronize()
        elapsed = time.perf_counter() - start
    print(count / elapsed)


if __name__ == "__main__":
    {"build": build, "read": read, "rate": rate}[sys.argv[1]](**json.loads(sys.argv[2]))
