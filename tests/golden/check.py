"""Check this implementation against numbers of the original TRM.

DIR holds model cases (`X.config.json`, `X.checkpoint.pt`, `X.npz`) and voting cases (`Y.json`, `Y.npz`).
Every case is computed in float32, on the CPU unless another device is named. The worst absolute difference
is printed; above 1e-4 the exit status is 1.

Some of the recorded models amplify a rounding twentyfold per ACT step, so that two processors agree on the
first step and differ in the second digit of the third. No implementation can be nearer to such a number than
the rounding of its weights. So each quantity may differ by what moving every weight to a neighbouring float32
does to it here, times 4, if that is more.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from dataset import augment, canvas
from dataset.views import BLANK_ID
from evaluation.metrics import AnsweredQuery, score
from evaluation.records import attempts
from evaluation.voting import VoteTable
from models.act import act_step, initial_carry
from models.core import RecursiveModel
from models.foreign import load_original, original_name
from models.losses import ObjectiveConfig, act_loss
from models.trm import ARCHITECTURES, DataSizes, arch_config

CPU = torch.device("cpu")
TOLERANCE = 1e-4
ROUNDING_FACTOR = 4
NEIGHBOURS = 3  # draws of neighbouring weights, of which the largest movement counts
OBJECTIVE = ObjectiveConfig(
    loss_type="stablemax_cross_entropy",
    halt_loss_weight=0.5,
    kl_weight=0.0,
    reconstruct_weight=0.0,
    contrastive_weight=0.0,
    contrastive_temperature=0.1,
    differential_weight=0.0,
)
METRICS = (
    "count",
    "accuracy",
    "exact_accuracy",
    "q_halt_accuracy",
    "steps",
    "lm_loss",
    "q_halt_loss",
    "q_continue_loss",
)


# Our options under which the numbers are the original's, which has no such keys.
AS_THE_ORIGINAL = {
    "grad_cycles": 1,
    "halt_threshold": None,
    "halt_pooling": "first",
    "dropout": 0.0,
    "carry_noise": 0.0,
    "act_enabled": True,
    "num_latents": 6,
    "relations": [],
}


def build_case(case: Path) -> RecursiveModel:
    """The original's model of a case, with its weights, in our implementation."""
    original = json.loads(case.with_name(case.name + ".config.json").read_text())
    sizes = DataSizes(original["vocab_size"], original["num_puzzle_identifiers"], original["seq_len"])
    given = {"name": "trm", **AS_THE_ORIGINAL, **original}
    config_class, model_class = ARCHITECTURES[given["name"]]
    model = model_class(arch_config({key: given[key] for key in config_class.model_fields}), sizes)
    model.load_state_dict(load_original(case.with_name(case.name + ".checkpoint.pt")))
    return model


class Difference(NamedTuple):
    """Largest absolute difference of a quantity, and what it may be."""

    found: float
    allowed: float = TOLERANCE


def check_model(case: Path, device: torch.device = CPU) -> dict[str, Difference]:
    """The difference of every recorded quantity, computed on `device`."""
    golden = dict(np.load(case.with_name(case.name + ".npz")))
    ours = computed(build_case(case).to(device), golden)
    unchecked = set(golden) - set(ours) - {"inputs", "labels", "puzzle_identifiers"}
    if unchecked:
        raise SystemExit(f"{case.name}: nothing of ours corresponds to {', '.join(sorted(unchecked))}")
    moved = [
        computed(with_neighbouring_weights(build_case(case), seed).to(device), golden)
        for seed in range(NEIGHBOURS)
    ]
    rounding = {
        name: max(largest_difference(other[name], value) for other in moved) for name, value in ours.items()
    }
    return {
        name: Difference(
            largest_difference(value, golden[name]), max(TOLERANCE, ROUNDING_FACTOR * rounding[name])
        )
        for name, value in ours.items()
    }


def with_neighbouring_weights(model: RecursiveModel, seed: int) -> RecursiveModel:
    """The model with every weight moved to the next float32 above or below, at random."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            side = torch.randint(0, 2, weight.shape, generator=generator) * 2 - 1
            weight.copy_(torch.nextafter(weight, side * torch.inf))
    return model


def largest_difference(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.abs(first - second).max())


def computed(model: RecursiveModel, golden: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Those quantities of a case that it records, by this implementation."""
    data = {
        "inputs": torch.from_numpy(golden["inputs"]),
        "labels": torch.from_numpy(golden["labels"]).long(),
        "puzzle_identifiers": torch.from_numpy(golden["puzzle_identifiers"]),
    }
    device = next(model.parameters()).device
    data = {name: value.to(device) for name, value in data.items()}
    values: dict[str, np.ndarray] = {}

    def record(name: str, value: torch.Tensor | float) -> None:
        if name in golden:
            values[name] = torch.as_tensor(value).detach().double().cpu().numpy()

    steps = sorted(
        int(name.removeprefix("eval_logits_")) for name in golden if name.startswith("eval_logits_")
    )
    for mode in ("eval", "train"):
        model.train(mode == "train")
        carry = initial_carry(model, data)
        for step in steps:
            model.zero_grad()
            with torch.set_grad_enabled(mode == "train"):
                output = act_step(model, carry, data)
                loss, metrics = act_loss(output, OBJECTIVE)
            carry = output.carry
            record(f"{mode}_logits_{step}", output.logits)
            record(f"{mode}_q_halt_{step}", output.q_halt_logits)
            record(f"{mode}_loss_{step}", loss)
            record(f"{mode}_halted_{step}", carry.halted)
            record(f"{mode}_steps_{step}", carry.steps)
            for name in METRICS:
                record(
                    f"{mode}_{name}_{step}" + ("_metric" if mode == "train" else ""), metrics.get(name, 0.0)
                )
            if mode == "train":
                loss.backward()
                for name, parameter in model.named_parameters():
                    record(f"grad_{step}:model.inner.{original_name(name)}", parameter.grad.norm())
                ((_, rows),) = model.context.gathered
                model.context.gathered.clear()
                record(f"grad_{step}:puzzle_emb_local", rows.grad.norm())
    return values


def check_voting(case: Path) -> dict[str, Difference]:
    """The difference of the scores, and the number of attempts in the submission that differ.

    Where the original submits an empty grid, which is never an answer here, the attempt is not compared.
    """
    expected = json.loads(case.with_suffix(".json").read_text())
    arrays = dict(np.load(case.with_suffix(".npz")))
    puzzles = {
        name: [to_pair(pair) for pair in puzzle["test"]] for name, puzzle in expected["test_puzzles"].items()
    }
    votes = VoteTable()
    inputs, predictions = canvas.decode(arrays["inputs"]), canvas.decode(arrays["preds"])
    for view, (identifier, asked, answer, q) in enumerate(
        zip(arrays["puzzle_identifiers"], inputs, predictions, arrays["q_halt_logits"], strict=True)
    ):
        if identifier == BLANK_ID:
            continue
        name, transform, colours = augment.parse_name(expected["identifiers"][identifier])
        question = augment.invert(asked, transform, colours)
        for number, (grid, _) in enumerate(puzzles[name]):
            if np.array_equal(grid, question):
                votes.add(
                    (name, number),
                    view,
                    augment.invert(answer, transform, colours) if answer.size else answer,
                    float(q),
                )
    answered = [
        AnsweredQuery(task, votes.ranked((name, number)), truth)
        for task, (name, queries) in enumerate(puzzles.items())
        for number, (_, truth) in enumerate(queries)
    ]
    ks = [int(name.split("@")[1]) for name in expected["expected"]]
    ours = {s.metric: s.value for s in score(answered, ks)}
    difference = {name: Difference(abs(ours[name] - value)) for name, value in expected["expected"].items()}
    compared = [
        attempts(votes.ranked((name, number)))[key] == grid
        for name, queries in expected["submission"].items()
        for number, given in enumerate(queries)
        for key, grid in given.items()
        if grid
    ]
    return {**difference, "submission attempts that differ": Difference(len(compared) - sum(compared))}


def to_pair(pair: dict) -> tuple[np.ndarray, np.ndarray]:
    """Input and output of a pair in the ARC format."""
    return np.array(pair["input"], np.uint8), np.array(pair["output"], np.uint8)


def check(folder: Path, device: torch.device = CPU) -> bool:
    """Check every case in `folder`, models on `device`; print a line each, and say whether all pass."""
    models = [
        path.with_name(path.name.removesuffix(".config.json"))
        for path in sorted(folder.glob("*.config.json"))
    ]
    votings = [
        path.with_suffix("")
        for path in sorted(folder.glob("*.json"))
        if not path.name.endswith(".config.json")
    ]
    if not models and not votings:
        print(f"no golden case in {folder}", file=sys.stderr)
        return False
    passed = True
    for kind, cases, checked in (
        ("model", models, partial(check_model, device=device)),
        ("voting", votings, check_voting),
    ):
        for case in cases:
            differences = checked(case)
            name, (found, allowed) = max(
                differences.items(), key=lambda item: item[1].found / item[1].allowed
            )
            good = found <= allowed
            passed &= good
            print(
                f"{'ok  ' if good else 'FAIL'} {kind} {case.name}: {len(differences)} quantities, "
                f"the worst is {name}: {found:.3g} of {allowed:.3g} allowed"
            )
    return passed
