"""Memory: running out of it, the largest batch, and no second copy in an evaluation."""

import gc
import math

import pytest
import torch

import pretrain_etrm
from evaluation import in_training
from tests.support.runs import TINY, run, train_briefly
from training.state import TrainState
from utils import device
from utils.errors import UserError


def test_out_of_memory_says_what_to_change(fewshot, tmp_path, monkeypatch):
    def train_step(*arguments):
        return torch.empty(2**50, dtype=torch.uint8)

    monkeypatch.setattr("training.start.train_step", train_step)
    words = r"out of memory in training step 1, global_batch_size=8 over 1 .*, canvas side 6, "
    words += r"\d demonstrations; lower .*find_batch_size"
    with pytest.raises(UserError, match=words):
        train_briefly(fewshot, tmp_path, "train_steps=1")
    monkeypatch.undo()
    monkeypatch.setattr(in_training, "evaluate", lambda *arguments, **named: train_step())
    with pytest.raises(
        UserError, match="out of memory in the evaluation at step 1; lower evaluation.batch_size=64"
    ):
        train_briefly(fewshot, tmp_path, "train_steps=1", "eval_interval=1")
    with pytest.raises(RuntimeError, match="something else"), device.explains_out_of_memory("", ""):
        raise RuntimeError("something else")


def test_the_largest_batch_is_found_by_doubling_and_bisection(monkeypatch):
    from tools import find_batch_size

    tried = []

    def fits(overrides, batch, memory_limit):
        tried.append(batch)
        return batch <= limit

    monkeypatch.setattr(find_batch_size, "fits", fits)
    for limit in (0, 1, 5, 31, 1000):
        tried.clear()
        found = find_batch_size.search([], None, 1 << 16)
        assert limit - max(0, limit // 32) <= found <= limit and len(tried) <= 2 + 2 * math.log2(
            max(limit, 2)
        ), (limit, tried)
    assert find_batch_size.search([], None, 7) == 7


def test_a_batch_fits_into_much_memory_and_not_into_little(fewshot):
    overrides = [*TINY, f"data.path={fewshot.path}", "arch.hidden_size=64"]
    program = "import sys; from tools.find_batch_size import trial; "
    program += "print([trial(sys.argv[1:], b, 10**9) for b in (4, 20_000)])"
    done = run("-c", program, *overrides)
    assert done.stdout.strip() == "[True, False]", done.stderr


def test_a_batch_is_tried_as_the_run_takes_it_and_in_its_last_stage(fewshot, monkeypatch):
    from tools import find_batch_size

    tried = []
    monkeypatch.setattr(
        "training.start.train_step",
        lambda state, batch, config, world: tried.append((state.step, config.micro_batch_size)),
    )
    assert find_batch_size.trial(
        [*TINY, f"data.path={fewshot.path}", "train_steps=50", "micro_batch_size=2"], 4, None
    )
    assert set(tried) == {(50, 2)}


def test_evaluation_holds_no_second_copy_of_weights_or_optimiser(fewshot, tmp_path, monkeypatch):
    """Bytes of all living tensors, each storage once: the averaged weights trade places with the raw ones."""

    def living() -> int:
        gc.collect()
        storages = {}
        for thing in gc.get_objects():
            # By type: some modules answer with a warning, and a compiler's stand-ins hold no memory.
            if type(thing) in (torch.Tensor, torch.nn.Parameter):
                storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        return sum(storages.values())

    found = {}
    real_log, real_evaluate = in_training.log_evaluation, in_training.evaluate

    def evaluate(model, *arguments, **named):
        found["inside"] = living()
        found["averaged"] = [p.detach().clone() for p in model.parameters()]
        return real_evaluate(model, *arguments, **named)

    def log_evaluation(run, *arguments):
        state: TrainState = run.state
        pointers = [p.data_ptr() for p in state.model.parameters()]
        found["weights"] = sum(p.nbytes for p in state.model.parameters())
        found["before"] = living()
        shadow = [value.clone() for value in state.ema.shadow.values()]
        found["before"] += sum(value.nbytes for value in shadow)
        real_log(run, *arguments)
        assert all(torch.equal(one, other) for one, other in zip(found["averaged"], shadow, strict=True))
        assert pointers == [p.data_ptr() for p in state.model.parameters()]

    monkeypatch.setattr(pretrain_etrm, "log_evaluation", log_evaluation)
    monkeypatch.setattr(in_training, "evaluate", evaluate)
    train_briefly(fewshot, tmp_path, "train_steps=3", "eval_interval=3", "evaluation.num_views=1")
    assert abs(found["inside"] - found["before"]) < 0.02 * found["weights"], found
