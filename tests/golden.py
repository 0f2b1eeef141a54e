"""Check this implementation against numbers of the original TRM: python -m tests.golden DIR

DIR holds model cases (`X.config.json`, `X.checkpoint.pt`, `X.npz`) and voting cases (`Y.json`, `Y.npz`). Every case is
computed in float32 on the CPU; the largest absolute difference is printed, and above 1e-4 the exit status is 1.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

from models.act import act_step, initial_carry
from models.losses import ObjectiveConfig, act_loss
from models.pretrained import load_original
from models.trm import TRM, ArchConfig, DataSizes

TOLERANCE = 1e-4
OBJECTIVE = ObjectiveConfig(loss_type="stablemax_cross_entropy", halt_loss_weight=0.5)
METRICS = ("count", "accuracy", "exact_accuracy", "q_halt_accuracy", "steps", "lm_loss", "q_halt_loss", "q_continue_loss")


def build_case(case: Path) -> TRM:
    """The original's model of a case, with its weights, in our implementation."""
    original = json.loads(case.with_name(case.name + ".config.json").read_text())
    sizes = DataSizes(original["vocab_size"], original["num_puzzle_identifiers"], original["seq_len"])
    arch = ArchConfig(name="trm", **{key: original[key] for key in ArchConfig.model_fields if key != "name"})
    model = TRM(arch, sizes)
    model.load_state_dict(load_original(case.with_name(case.name + ".checkpoint.pt")))
    return model


def check_model(case: Path) -> dict[str, float]:
    """Largest absolute difference of every recorded quantity."""
    model = build_case(case)
    golden = dict(np.load(case.with_name(case.name + ".npz")))
    data = {
        "inputs": torch.from_numpy(golden["inputs"]),
        "labels": torch.from_numpy(golden["labels"]).long(),
        "puzzle_identifiers": torch.from_numpy(golden["puzzle_identifiers"]),
    }
    difference: dict[str, float] = {}

    def compare(name: str, value: torch.Tensor | float) -> None:
        if name in golden:
            ours = torch.as_tensor(value).detach().double().numpy()
            difference[name] = float(np.abs(ours - golden[name]).max())

    steps = sorted(int(name.removeprefix("eval_logits_")) for name in golden if name.startswith("eval_logits_"))
    for mode in ("eval", "train"):
        model.train(mode == "train")
        carry = initial_carry(model, data)
        for step in steps:
            model.zero_grad()
            with torch.set_grad_enabled(mode == "train"):
                output = act_step(model, carry, data)
                loss, metrics = act_loss(output, OBJECTIVE)
            carry = output.carry
            compare(f"{mode}_logits_{step}", output.logits)
            compare(f"{mode}_q_halt_{step}", output.q_halt_logits)
            compare(f"{mode}_loss_{step}", loss)
            compare(f"{mode}_halted_{step}", carry.halted)
            compare(f"{mode}_steps_{step}", carry.steps)
            for name in METRICS:
                compare(f"{mode}_{name}_{step}" + ("_metric" if mode == "train" else ""), metrics.get(name, 0.0))
            if mode == "train":
                loss.backward()
                for name, parameter in model.named_parameters():
                    original = {"embed_tokens.weight": "embed_tokens.embedding_weight"}.get(name, name)
                    compare(f"grad_{step}:model.inner.{original}", parameter.grad.norm())
                ((_, rows),) = model.context.gathered
                model.context.gathered.clear()
                compare(f"grad_{step}:puzzle_emb_local", rows.grad.norm())
    unchecked = set(golden) - set(difference) - set(data)
    if unchecked:
        raise SystemExit(f"{case.name}: nothing of ours corresponds to {', '.join(sorted(unchecked))}")
    return difference
