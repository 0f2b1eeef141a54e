"""Drives an ancestor's own training step or evaluation: PYTHONPATH=CHECKOUT python steps.py {trm,sudoku,etrm,eval,reference} OPTIONS

OPTIONS are JSON. The ancestor's files run unchanged. What its environment lacks is put in its place from here: small
packages that it imports, and on a CPU the word "cuda".
"""

import importlib
import importlib.util
import json
import os
import sys
from itertools import cycle
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from turns import answer_channel, serve

TOKENS = {900: 12, 81: 11}  # vocabulary by cells of the canvas: ARC, Sudoku


class AdamATan2(torch.optim.AdamW):
    """For the package adam_atan2, which needs a GPU: AdamW in a single fused pass, which costs no more."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], weight_decay: float):
        super().__init__(params, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)


STAND_INS = {
    "adam_atan2": {"AdamATan2": AdamATan2},
    "coolname": {},
    "wandb": {},
    "numba": {"njit": lambda function: function},
}


class OnCpu:
    """PyTorch for a script that names "cuda" throughout."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def device(name: str) -> torch.device:
        return torch.device("cpu")

    @staticmethod
    def zeros(*shape: Any, device: str, **named: Any) -> torch.Tensor:
        return torch.zeros(*shape, **named)


def script(name: str, device: torch.device) -> ModuleType:
    """The ancestor's training script as a module that runs on `device`."""
    sys.path.append(sys.path.pop(0))  # what is installed comes before what stands beside this file
    for package, contents in STAND_INS.items():
        if importlib.util.find_spec(package) is None:
            sys.modules[package] = ModuleType(package)
            vars(sys.modules[package]).update(contents)
    module = importlib.import_module(name)
    if device.type == "cpu":
        os.environ["DISABLE_COMPILE"] = "1"
        torch.Tensor.cuda = lambda self: self
        module.torch = OnCpu()
    return module


def batches(file: str) -> Any:
    """The batches in `file`, over and over, as tensors."""
    with np.load(file) as arrays:
        stored = dict(arrays)
    count = len(stored["inputs"])
    return cycle(
        [{name: torch.from_numpy(values[i]) for name, values in stored.items()} for i in range(count)]
    )


def metadata(data: str, identifiers: int) -> SimpleNamespace:
    """What the scripts ask of a dataset of these batches; so large that the training never ends."""
    cells = next(batches(data))["inputs"].shape[1]
    return SimpleNamespace(
        vocab_size=TOKENS[cells],
        seq_len=cells,
        num_puzzle_identifiers=identifiers,
        total_groups=10**6,
        mean_puzzle_examples=1.0,
        sets=["all"],
        blank_identifier_id=0,
    )


def training(module: ModuleType, config: dict[str, Any], data: str, identifiers: int) -> Any:
    """The ancestor's step: its training function and its moving average, as its loop calls them."""
    if hasattr(module, "train_batch_encoder"):
        settings, init, train_batch = (
            module.PretrainEncoderConfig,
            module.init_train_state_encoder,
            module.train_batch_encoder,
        )
    else:
        settings, init, train_batch = module.PretrainConfig, module.init_train_state, module.train_batch
    config = settings(**config)
    state = init(config, metadata(data, identifiers), rank=0, world_size=1)
    average = module.EMAHelper(mu=config.ema_rate)
    average.register(state.model)
    state.model.train()
    stream = batches(data)

    def step() -> dict[str, float]:
        batch = next(stream)
        train_batch(config, state, batch, config.global_batch_size, rank=0, world_size=1)
        average.update(state.model)
        return {"samples": len(batch["inputs"])}

    return step


def evaluation(module: ModuleType, config: dict[str, Any], data: str, tasks: str) -> Any:
    """The ancestor's evaluation of all views in `data`, up to pass@k over the tasks in the folder `tasks`."""
    config = module.PretrainEncoderConfig(**config)
    about = metadata(data, 1)
    state = module.init_train_state_encoder(config, about, rank=0, world_size=1)
    state.model.eval()
    evaluator = importlib.import_module("evaluators.arc").ARC(tasks, about, aggregated_voting=False)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with np.load(data) as arrays:
        count = len(arrays["inputs"])
    stream = batches(data)
    act, limit = state.model.model.config, state.model.model.config.halt_max_steps
    act.halt_max_steps = 1  # the first call only warms up

    def step() -> dict[str, float]:
        shown = [("all", batch, len(batch["inputs"])) for batch, _ in zip(stream, range(count), strict=False)]
        module.evaluate_encoder(config, state, shown, about, [evaluator], 0, 1, None)
        act.halt_max_steps = limit
        return {"samples": sum(size for _, _, size in shown)}

    return step


def reference(module: ModuleType, config: dict[str, Any], data: str, output: str) -> None:
    """Write the ETRM ancestor's initial weights and the context that its encoder computes from the first batch."""
    state = module.init_train_state_encoder(
        module.PretrainEncoderConfig(**config), metadata(data, 1), rank=0, world_size=1
    )
    batch, model = next(batches(data)), state.model.model
    with torch.no_grad():
        context = model.encoder(batch["demo_inputs"], batch["demo_labels"], batch["demo_mask"])
    torch.save({"weights": model.state_dict(), "context": context}, output)


def main(what: str, options: dict[str, Any]) -> None:
    answers, device = answer_channel(), torch.device(options.pop("device"))
    torch.set_num_threads(options.pop("threads"))
    torch.manual_seed(0)
    module = script("pretrain" if what in ("trm", "sudoku") else "pretrain_etrm", device)
    if what == "reference":
        reference(module, **options)
    else:
        serve((evaluation if what == "eval" else training)(module, **options), device, answers)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
