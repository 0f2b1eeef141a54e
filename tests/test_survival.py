"""Stopping and going on: signals, checkpoints kept and found, validation, early stopping, failing steps, processes and disks."""

import gc
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import pretrain_etrm
from dataset.batch import materialise
from dataset.samplers import SAMPLERS
from dataset.views import EvaluationSet
from evaluation.evaluate import Evaluation
from evaluation.metrics import Score
from experiments.faults import Launched
from tests.conftest import ROOT, TINY, evaluate_here, load_config, run
from tests.test_training import ALONE, CPU, Trainer, arguments_for, train_here, weights_of
from training.nonfinite import dump_batch, load_batch
from training.state import TrainState
from training.step import train_step
from utils import checkpoint, device
from utils.distributed import World
from utils.errors import EXIT_INTERRUPTED, EXIT_STOPPED, UserError, reports_user_errors
from utils.signals import StopRequest

VALIDATED = ("validation=2", "eval_interval=2", "evaluation.num_views=1")


def train(store, output: Path, *overrides: str) -> Path:
    """A quick run in this process; its folder."""
    return train_here(store, output, "arch.H_cycles=1", "arch.halt_max_steps=2", "log_interval=50", *overrides)


def metrics_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def steps_of(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def answer_with(monkeypatch, scores: dict[int, float]) -> list[tuple[str, int]]:
    """Let evaluations find these values of best_metric, by step; what was evaluated is collected."""
    real, asked = pretrain_etrm.log_evaluation, []

    def log_evaluation(logger, state, *arguments):
        def evaluate(*positional, **named):
            asked.append((named["split"], state.step))
            named["report"](1)
            found = Score("none", "ARC/pass@1", scores[state.step], 0.0, 1.0, 2)
            unread = dict.fromkeys(
                ("adaptation", "num_views", "questions", "predictions", "prediction_seconds", "by_subset", "answered", "with_steps")
            )
            return Evaluation("inductive", **dict.fromkeys(unread), scores=[found], means={}, counts={"tasks": 2}, notes=[])

        monkeypatch.setattr(pretrain_etrm, "evaluate", evaluate)
        real(logger, state, *arguments)

    monkeypatch.setattr(pretrain_etrm, "log_evaluation", log_evaluation)
    return asked


def test_validation_tasks_are_held_out_by_their_ids_and_asked_like_test_tasks(fewshot):
    held = fewshot.hold_out(2)
    assert held.tasks_of("validation").size == 2 and held.tasks_of("train").size == 4
    assert np.array_equal(held.tasks_of("test"), fewshot.tasks_of("test"))
    assert np.array_equal(held.task_split, fewshot.hold_out(1 / 3).task_split)
    chosen = {held.task_ids[task] for task in held.tasks_of("validation")}
    order = np.arange(len(fewshot.task_ids))[::-1]  # the same tasks in another order
    turned = replace(fewshot, task_ids=[fewshot.task_ids[i] for i in order], task_split=fewshot.task_split[order])
    assert {turned.task_ids[task] for task in turned.hold_out(2).tasks_of("validation")} == chosen

    config = load_config(fewshot)
    sampler = SAMPLERS["fewshot"](held, config.data, 0, 8)
    trained = set(np.concatenate([choice.tasks for choice in sampler.choices.values()]).tolist())
    assert trained.isdisjoint(held.tasks_of("validation").tolist())
    questions = EvaluationSet(held, config.data, "validation", 1, 0)
    for query in questions.queries:
        border = held.task_pairs[query.task] + held.task_demonstrations[query.task]
        assert query.pair >= border and all(pair < border for pair in query.demos)
        pairs = range(held.task_pairs[query.task], held.task_pairs[query.task + 1])
        assert not set(held.pair_fingerprint[list(pairs)]) & set(sampler.trained_pairs)


@pytest.mark.parametrize("amount", [6, 0.01, 0.99])
def test_a_hold_out_that_leaves_no_task_on_a_side_is_refused(fewshot, amount):
    with pytest.raises(UserError, match="some must remain on both sides"):
        fewshot.hold_out(amount)


def test_a_model_with_puzzle_rows_cannot_hold_tasks_out(puzzle):
    with pytest.raises(UserError, match="puzzle rows cannot answer tasks held out"):
        puzzle.hold_out(1)


@pytest.mark.parametrize("option", ["patience=2", "keep_best_checkpoints=1"])
def test_choosing_by_test_scores_is_refused(fewshot, option):
    with pytest.raises(UserError, match="needs validation and eval_interval"):
        load_config(fewshot, option, "eval_interval=2")


def test_the_best_and_the_newest_checkpoints_stay_and_patience_ends_the_run(fewshot, tmp_path, monkeypatch, capsys):
    asked = answer_with(monkeypatch, {2: 0.5, 4: 0.75, 6: 0.5, 8: 0.75, 10: 0.5, 12: 1.0})
    options = (*VALIDATED, "train_steps=20", "patience=3", "keep_best_checkpoints=1", "keep_checkpoints=2", "checkpoint_interval=100")
    folder = train(fewshot, tmp_path, *options)
    assert asked == [("validation", step) for step in (2, 4, 6, 8, 10)]
    assert steps_of(folder) == ["step_10", "step_4", "step_8"]
    assert "best ARC/pass@1 on the validation tasks: 0.750 at step 4 (no better one" in capsys.readouterr().out
    assert checkpoint.resolve(folder / "best").name == "step_4" and checkpoint.resolve(folder).name == "step_10"
    evaluated = [line for line in metrics_of(folder) if "protocol" in line]
    assert [line["validation/ARC/pass@1"] for line in evaluated] == [0.5, 0.75, 0.5, 0.75, 0.5]
    train(fewshot, tmp_path, *options)
    assert len(asked) == 5, "a run out of patience stays ended"
    train(fewshot, tmp_path, *options[:-1], "patience=null", "train_steps=12", "checkpoint_interval=50")
    assert asked[5:] == [("validation", 12)] and checkpoint.resolve(folder / "best").name == "step_12"


@pytest.mark.parametrize("scores, ended", [([0, 0, 0, 0], False), ([0, 0, 0, 0.5, 0], False), ([0, 0, 0.5, 0, 0], True), ([1, 0, 0], True)])
def test_patience_begins_when_the_score_first_moves(scores, ended):
    state = TrainState(None, [], None, scores=dict(enumerate(scores)))
    assert state.out_of_patience(2) == ended and not state.out_of_patience(None)


def test_a_run_killed_during_an_evaluation_makes_up_for_it(fewshot, tmp_path, monkeypatch):
    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pretrain_etrm, "log_evaluation", killed)
        with pytest.raises(KeyboardInterrupt):
            train(fewshot, tmp_path, *VALIDATED, "train_steps=4")
    assert steps_of(tmp_path / "r") == ["step_2"], "the checkpoint comes before the evaluation"
    asked = answer_with(monkeypatch, {2: 0.5, 4: 0.25})
    train(fewshot, tmp_path, *VALIDATED, "train_steps=4")
    assert asked == [("validation", 2), ("validation", 4)]


def test_a_metric_that_is_no_number_does_not_end_the_run_and_is_no_score(fewshot, tmp_path, monkeypatch):
    answer_with(monkeypatch, {2: math.nan, 4: 0.5})
    folder = train(fewshot, tmp_path, *VALIDATED, "train_steps=4", "patience=1")
    assert [line["validation/ARC/pass@1"] for line in metrics_of(folder) if "protocol" in line] == [None, 0.5]
    assert not checkpoint.lacks_evaluation(folder / "checkpoints" / "step_2")
    assert checkpoint.load_score(folder / "checkpoints" / "step_2") is None and checkpoint.resolve(folder / "best").name == "step_4"


def test_a_metric_that_is_not_evaluated_is_named(fewshot, tmp_path):
    with pytest.raises(UserError, match=r"best_metric=ARC/pass@3 \(did you mean"):
        train(fewshot, tmp_path, *VALIDATED, "train_steps=2", "best_metric=ARC/pass@3")
    assert not (tmp_path / "r").exists(), "it is said before the training"


def test_the_evaluate_command_knows_the_validation_tasks_and_the_best_checkpoint(fewshot, tmp_path, capsys):
    folder = train(fewshot, tmp_path, *VALIDATED, "train_steps=2")
    evaluate_here(f"checkpoint={folder}/best", "split=validation", "num_views=1", "controls=[]", "report=false")
    assert "split validation: 2 tasks" in capsys.readouterr().out
    (results,) = (folder / "evaluations").glob("*/results.json")
    scores = {s["metric"]: s["value"] for s in json.loads(results.read_text())["scores"]}
    assert scores["ARC/pass@1"] == checkpoint.load_score(folder / "checkpoints" / "step_2")


def test_checkpoints_by_time(fewshot, tmp_path, monkeypatch):
    clock = iter(range(0, 10_000, 30))  # every look at the clock takes half a minute
    monkeypatch.setattr(pretrain_etrm, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    folder = train(fewshot, tmp_path, "train_steps=9", "checkpoint_minutes=1.6", "keep_checkpoints=9")
    assert steps_of(folder) == ["step_4", "step_8", "step_9"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_saves_at_the_next_step_and_has_its_own_exit_status(number, fewshot, tmp_path, monkeypatch, capsys):
    real, seen = pretrain_etrm.train_step, []

    def train_step(state, batch, settings):
        seen.append(state.step)
        if len(seen) == 3:
            os.kill(os.getpid(), number)
        return real(state, batch, settings)

    monkeypatch.setattr(pretrain_etrm, "train_step", train_step)
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as end:
        reports_user_errors(train)(fewshot, tmp_path, "train_steps=6")
    assert end.value.code == EXIT_STOPPED == 75 and steps_of(tmp_path / "r") == ["step_3"]
    assert f"stopped by {number.name} at step 3: checkpoint" in capsys.readouterr().err
    assert signal.getsignal(number) is before
    train(fewshot, tmp_path, "train_steps=6")
    train(fewshot, tmp_path / "whole", "train_steps=6")
    one, other = weights_of(tmp_path, 6), weights_of(tmp_path / "whole", 6)
    assert all(torch.equal(one[name], other[name]) for name in one) and seen[3:6] == [3, 4, 5]


def test_a_second_interrupt_does_not_wait(capsys):
    def main() -> None:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0)
            assert stop.signal == "SIGINT"
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
            raise AssertionError("not interrupted")

    with pytest.raises(SystemExit) as end:
        reports_user_errors(main)()
    assert end.value.code == EXIT_INTERRUPTED == 130


def test_preemption_of_one_process_stops_both_and_validation_of_one_task_hangs_none(fewshot, tmp_path):
    """Two processes, one evaluation batch: the process without work waits for the other, and both agree on the signal."""
    options = ("train_steps=100000", "eval_interval=2", "validation=1", "evaluation.num_views=1", "timeout_minutes=1")
    arguments = arguments_for(fewshot, tmp_path, *options)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launched = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment)
    folder = tmp_path / "r" / "checkpoints"
    deadline = time.monotonic() + 120
    while not (checkpoint.latest(folder) and checkpoint.load_info(checkpoint.latest(folder))["step"] >= 4) and time.monotonic() < deadline:
        time.sleep(0.02)
    launched.send_signal(signal.SIGTERM)
    errors = launched.communicate(timeout=60)[1]
    assert "stopped by SIGTERM at step" in errors and launched.returncode != 0, errors
    info = checkpoint.load_info(checkpoint.latest(folder))
    assert info["world_size"] == 2 and len(info["scores"]) >= 1


def test_resume_after_a_restart_continues_whatever_the_run_began_with(fewshot, tmp_path, monkeypatch):
    start = train(fewshot, tmp_path / "first", "train_steps=2")
    train(fewshot, tmp_path, "train_steps=4", f"resume={start}", "checkpoint_interval=3", "log_interval=1")
    assert metrics_of(tmp_path / "r")[0]["step"] == 3
    with pytest.raises(UserError, match="resume=never would overwrite"):
        train(fewshot, tmp_path, "train_steps=6", "resume=never")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    for how in ("never", str(start)):
        steps = 6 if how == "never" else 8
        train(fewshot, tmp_path, f"train_steps={steps}", f"resume={how}", "log_interval=1")
        assert steps_of(tmp_path / "r")[-1] == f"step_{steps}"
    assert [line["step"] for line in metrics_of(tmp_path / "r")] == [3, 4, 5, 6, 7, 8]


def test_remains_of_killed_writers_and_half_deleted_checkpoints_are_no_checkpoints(fewshot, tmp_path):
    trainer = Trainer(fewshot)
    trainer.steps(1)
    path = trainer.state.save(tmp_path, ALONE, {}, keep=2)
    for name in (".step_7.tmp", ".step_5.old", "step_9"):
        shutil.copytree(path, tmp_path / name)
    (tmp_path / "step_9" / "info.json").unlink()
    assert checkpoint.latest(tmp_path) == path
    trainer.steps(1)
    trainer.state.save(tmp_path, ALONE, {}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_1", "step_2", "step_9"]


def test_too_little_disk_space_is_said_before_anything_is_written(fewshot, tmp_path, monkeypatch):
    trainer = Trainer(fewshot)
    trainer.steps(1)
    path = trainer.state.save(tmp_path, ALONE, {}, keep=1)
    written = sum(file.stat().st_size for file in path.iterdir())
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda folder: usage(0, 0, int(0.9 * written)))
    monkeypatch.setattr(checkpoint, "save_file", lambda *arguments: pytest.fail("written"))
    trainer.steps(1)
    with pytest.raises(UserError, match=r"step_2: it needs \d.\d\d MB, and the disk has \d.\d\d MB left; earlier checkpoints are intact"):
        trainer.state.save(tmp_path, ALONE, {}, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step_1"]


def test_a_batch_without_a_finite_gradient_is_written_down_and_can_be_drawn_again(fewshot, tmp_path, monkeypatch):
    real = pretrain_etrm.train_step
    asked = {}

    def train_step(state, batch, settings):
        asked[state.step] = batch.data
        hook = state.model.lm_head.weight.register_hook(lambda gradient: gradient * math.nan) if state.step > 1 else None
        result = real(state, batch, settings)
        if hook:
            hook.remove()
        return result

    monkeypatch.setattr(pretrain_etrm, "train_step", train_step)
    with pytest.raises(UserError, match=r"step 5: .* not finite 3 times in a row; last checkpoint: step 4; the batches are in"):
        train(fewshot, tmp_path, "train_steps=9", "max_nonfinite_steps=3", "checkpoint_interval=2", "keep_checkpoints=1")
    folder = tmp_path / "r" / "nonfinite"
    assert sorted(file.name for file in folder.iterdir()) == [f"step_{step}_rank_0.pt" for step in (2, 3, 4)]
    content, samples = load_batch(folder / "step_3_rank_0.pt")
    drawn = materialise(samples, fewshot, fewshot.grid_table).data
    assert content["step"] == 3 and all(torch.equal(drawn[name], asked[3][name]) for name in drawn)
    assert math.isnan(content["grad_norms"]["inner"]) and "lm_loss" in content["metrics"]
    assert all(task in fewshot.task_ids for task in content["tasks"])


def test_what_a_step_worked_on_is_written_down_and_not_only_what_was_sampled(fewshot, tmp_path):
    trainer = Trainer(fewshot, "data.min_demos=2", "data.max_demos=2")
    first = trainer.batch()
    train_step(trainer.state, first, trainer.settings)
    trainer.state.model.lm_head.weight.register_hook(lambda gradient: gradient * math.nan)
    samples = trainer.sampler.sample(1)
    result = train_step(trainer.state, materialise(samples, fewshot, fewshot.grid_table), trainer.settings)
    content, _ = load_batch(dump_batch(tmp_path, 1, samples, result, fewshot, ALONE))
    steps = content["worked_on"].pop("steps")
    assert steps.tolist() == [2] * 8, "no row halts in its first step"
    assert all(torch.equal(value, first.data[name]) for name, value in content["worked_on"].items())


def test_the_newest_dumps_are_kept_and_a_full_disk_is_named(fewshot, tmp_path, monkeypatch):
    trainer = Trainer(fewshot)
    samples = trainer.sampler.sample(0)
    trainer.state.model.lm_head.weight.register_hook(lambda gradient: gradient * math.nan)
    result = train_step(trainer.state, materialise(samples, fewshot, fewshot.grid_table), trainer.settings)
    monkeypatch.setattr("training.nonfinite.KEPT", 3)
    for step in (8, 9, 10, 11, 100):
        dump_batch(tmp_path, step, samples, result, fewshot, ALONE)
    dump_batch(tmp_path, 1, samples, result, fewshot, World(1, 2))
    names = {file.name for file in (tmp_path / "nonfinite").iterdir()}
    assert names == {"step_10_rank_0.pt", "step_11_rank_0.pt", "step_100_rank_0.pt", "step_1_rank_1.pt"}
    monkeypatch.setattr("utils.checkpoint.os.fsync", lambda file: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match="cannot write .*step_101_rank_0.pt: No space left on device"):
        dump_batch(tmp_path, 101, samples, result, fewshot, ALONE)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_pytorchs_writer_says_that_the_disk_is_full():
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save_torch({"weights": torch.zeros(10**6)}, Path("/dev/full"))


def test_a_resumed_share_of_the_carries_holds_its_own_rows_only(fewshot, tmp_path):
    trainer = Trainer(fewshot)
    train_step(trainer.state, trainer.batch(), trainer.settings)
    path = trainer.state.save(tmp_path, ALONE, {}, keep=1)
    resumed = Trainer(fewshot)
    resumed.state.load(path, World(0, 4), CPU)
    (carry,) = resumed.state.carries.values()
    assert len(carry.steps) == 2 and carry.steps.untyped_storage().nbytes() == carry.steps.nbytes


def test_a_skipped_batch_of_several_updates_is_named_by_the_step_that_sampled_it(fewshot, tmp_path, monkeypatch):
    monkeypatch.setattr("training.step._all_finite", lambda norm, state: state.step < 3)
    with pytest.raises(UserError, match="step 4: the gradient was not finite 1 times"):
        train(fewshot, tmp_path, "mode=fct", "mode.num_act_steps=2", "arch.halt_max_steps=2", "train_steps=8", "max_nonfinite_steps=1")
    (file,) = (tmp_path / "r" / "nonfinite").iterdir()
    assert file.name == "step_2_rank_0.pt" and load_batch(file)[0]["step"] == 2


def test_out_of_memory_says_what_to_change(fewshot, tmp_path, monkeypatch):
    def train_step(*arguments):
        return torch.empty(2**50, dtype=torch.uint8)

    monkeypatch.setattr(pretrain_etrm, "train_step", train_step)
    words = r"out of memory in training step 1, global_batch_size=8 over 1 .*, canvas side 6, \d demonstrations; lower .*find_batch_size"
    with pytest.raises(UserError, match=words):
        train(fewshot, tmp_path, "train_steps=1")
    monkeypatch.undo()
    monkeypatch.setattr(pretrain_etrm, "evaluate", lambda *arguments, **named: train_step())
    with pytest.raises(UserError, match="out of memory in the evaluation at step 1; lower evaluation.batch_size=64"):
        train(fewshot, tmp_path, "train_steps=1", "eval_interval=1")
    with pytest.raises(RuntimeError, match="something else"), device.explains_out_of_memory("", ""):
        raise RuntimeError("something else")


def test_the_largest_batch_is_found_by_doubling_and_bisection(monkeypatch):
    from experiments import find_batch_size

    tried = []

    def fits(overrides, batch, memory_limit):
        tried.append(batch)
        return batch <= limit

    monkeypatch.setattr(find_batch_size, "fits", fits)
    for limit in (0, 1, 5, 31, 1000):
        tried.clear()
        found = find_batch_size.search([], None, 1 << 16)
        assert limit - max(0, limit // 32) <= found <= limit and len(tried) <= 2 + 2 * math.log2(max(limit, 2)), (limit, tried)
    assert find_batch_size.search([], None, 7) == 7


def test_a_batch_fits_into_much_memory_and_not_into_little(fewshot):
    overrides = [*TINY, f"data.path={fewshot.path}", "arch.hidden_size=64"]
    program = "import sys; from experiments.find_batch_size import trial; print([trial(sys.argv[1:], b, 10**9) for b in (4, 20_000)])"
    done = run("-c", program, *overrides)
    assert done.stdout.strip() == "[True, False]", done.stderr


def test_a_batch_is_tried_as_the_run_takes_it_and_in_its_last_stage(fewshot, monkeypatch):
    from experiments import find_batch_size

    tried = []
    monkeypatch.setattr(find_batch_size, "train_step", lambda state, batch, settings: tried.append((state.step, settings.micro_batch_size)))
    assert find_batch_size.trial([*TINY, f"data.path={fewshot.path}", "train_steps=50", "micro_batch_size=2"], 4, None)
    assert set(tried) == {(50, 2)}


def test_evaluation_holds_no_second_copy_of_weights_or_optimiser(fewshot, tmp_path, monkeypatch):
    """Bytes of all living tensors, each storage once: the averaged weights trade places with the raw ones."""

    def living() -> int:
        gc.collect()
        storages = {}
        for thing in gc.get_objects():
            # By type, without asking modules that answer with a warning; a compiler's stand-ins hold no memory.
            if type(thing) in (torch.Tensor, torch.nn.Parameter):
                storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        return sum(storages.values())

    found = {}
    real_log, real_evaluate = pretrain_etrm.log_evaluation, pretrain_etrm.evaluate

    def evaluate(model, *arguments, **named):
        found["inside"] = living()
        found["averaged"] = [p.detach().clone() for p in model.parameters()]
        return real_evaluate(model, *arguments, **named)

    def log_evaluation(logger, state: TrainState, *arguments):
        pointers = [p.data_ptr() for p in state.model.parameters()]
        found["weights"] = sum(p.nbytes for p in state.model.parameters())
        found["before"] = living()
        shadow = [value.clone() for value in state.ema.shadow.values()]
        found["before"] += sum(value.nbytes for value in shadow)
        real_log(logger, state, *arguments)
        assert all(torch.equal(one, other) for one, other in zip(found["averaged"], shadow, strict=True))
        assert pointers == [p.data_ptr() for p in state.model.parameters()]

    monkeypatch.setattr(pretrain_etrm, "log_evaluation", log_evaluation)
    monkeypatch.setattr(pretrain_etrm, "evaluate", evaluate)
    train(fewshot, tmp_path, "train_steps=3", "eval_interval=3", "evaluation.num_views=1")
    assert abs(found["inside"] - found["before"]) < 0.02 * found["weights"], found


@pytest.mark.slow
def test_what_the_fault_commands_promise(tmp_path):
    """The short version of `python -m experiments.faults`."""
    results = tmp_path / "faults.jsonl"
    done = run("-m", "experiments.faults", "killed_while_saving", "file_limit", "--kills", "5", "--output", str(results), timeout=600)
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert done.returncode == 0 and [line["fault"] for line in lines] == ["killed_while_saving", "file_limit"], done.stdout + done.stderr
    assert lines[0]["kills"] == 5 and lines[0]["most_steps_lost"] <= 1 and "File too large" in lines[1]["message"][0]


@pytest.mark.slow
def test_a_killed_rank_restarts_and_the_run_ends_bitwise_as_undisturbed(tmp_path):
    results = tmp_path / "faults.jsonl"
    done = run("-m", "experiments.faults", "rank_killed", "--kills", "2", "--output", str(results))
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = (json.loads(line) for line in results.read_text().splitlines())
    assert line["kills"] == 2 and line["bitwise_equal"]


@pytest.mark.parametrize(
    "log, told", [("torchrun: x\nerror: the disk is full\n", "error: the disk is full"), ("x\nSignal 9 (SIGKILL)\n", "Signal 9")]
)
def test_a_failed_check_says_what_the_run_left(tmp_path, log, told):
    (tmp_path / "log").write_text(log)
    message = Launched(None, tmp_path / "log").errors()
    assert told in message and ("torchrun" not in message)
