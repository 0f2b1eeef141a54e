"""Optimisers, schedule, EMA, a step's update, checkpoints and resume."""

import copy
import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import pretrain_etrm
from config import compose
from config.schema import PretrainConfig
from dataset.batch import materialise
from dataset.samplers import SAMPLERS
from models.context import PuzzleEmbedding
from models.core import DataSizes
from models.trm import build_model
from tests.conftest import ROOT, TINY, load_config, run
from training import optim
from training.ema import EMA
from training.optim import AdamATan2, SparseSignSGD, build_optimizers
from training.schedule import learning_rate
from training.state import TrainState
from training.step import StepSettings, train_step
from utils import checkpoint
from utils.distributed import World
from utils.errors import UserError, reports_user_errors

ALONE = World()
CPU = torch.device("cpu")
TRAINER = ("lr_warmup_steps=2", "train_steps=20")


class Trainer:
    """A tiny run in this process: of `config`, or of the usual one with `overrides`."""

    def __init__(self, store, *overrides: str, config: PretrainConfig | None = None, world: World = ALONE):
        self.store = store
        self.config = config = config or load_config(store, *TRAINER, *overrides)
        sampler = SAMPLERS[store.metadata.layout]
        self.sampler = sampler(store, config.data, config.seed, config.global_batch_size, world.rank, world.size)
        torch.manual_seed(config.seed)
        model = build_model(config.arch, DataSizes.of(store, config.data), config.encoder)
        self.state = TrainState(model, build_optimizers(model, config, CPU)[0], EMA(model, 0.9), self.sampler.trained_pairs)
        self.settings = StepSettings.of(config, world)

    def batch(self):
        return materialise(self.sampler.sample(self.state.step), self.store, self.store.grid_table)

    def steps(self, count: int) -> list[float]:
        results = [train_step(self.state, self.batch(), self.settings) for _ in range(count)]
        return [(result.metrics["lm_loss"] / result.metrics["rows"]).item() for result in results]


def test_adam_atan2_follows_its_formula():
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(7))
    optimizer = AdamATan2([parameter], lr=0.1, betas=(0.9, 0.95), weight_decay=0.2)
    x, m, v = parameter.detach().double().clone(), torch.zeros(7).double(), torch.zeros(7).double()
    for t in range(1, 6):
        gradient = torch.randn(7)
        parameter.grad = gradient.clone()
        optimizer.step()
        m = 0.9 * m + 0.1 * gradient.double()
        v = 0.95 * v + 0.05 * gradient.double() ** 2
        x = x * (1 - 0.1 * 0.2) - 0.1 * torch.atan2(m / (1 - 0.9**t), (v / (1 - 0.95**t)).sqrt())
        assert torch.allclose(parameter.detach().double(), x, atol=1e-6)


def test_adam_atan2_accepts_a_zero_rate_and_skips_parameters_without_gradient():
    parameter, idle = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = AdamATan2([parameter, idle], lr=0.0, betas=(0.9, 0.95), weight_decay=0.1)
    parameter.grad = torch.ones(2)
    optimizer.step()
    assert torch.equal(parameter, torch.ones(2)) and torch.equal(idle, torch.ones(2)) and not optimizer.state[idle]


def test_the_fused_optimiser_is_used_on_cuda_only_and_named(fewshot, monkeypatch):
    class Fused(AdamATan2):
        pass

    monkeypatch.setattr(optim, "FusedAdamATan2", Fused)
    model = Trainer(fewshot).state.model
    config = load_config(fewshot)
    assert "PyTorch foreach" in build_optimizers(model, config, CPU)[1]
    optimizers, name = build_optimizers(model, config, torch.device("cuda"))
    assert isinstance(optimizers[0], Fused) and "fused" in name


def test_sign_sgd_sums_each_identifier_before_the_sign_and_decays_touched_rows_only():
    embedding = PuzzleEmbedding(5, 4, 1, 4, torch.float32)
    torch.nn.init.normal_(embedding.weights)
    before = embedding.weights.clone()
    optimizer = SparseSignSGD(embedding, lr=0.1, weight_decay=0.5)
    gradients = []
    for ids in (torch.tensor([1, 3, 1]), torch.tensor([3, 4])):  # two micro-batches before one update
        context = embedding({"puzzle_identifiers": ids})
        weight = torch.randn_like(context.prefix)
        (context.prefix * weight).sum().backward()
        gradients += list(zip(ids.tolist(), weight[:, 0], strict=True))
    optimizer.step()
    optimizer.zero_grad()
    for row in range(5):
        total = sum((gradient for index, gradient in gradients if index == row), torch.zeros(4))
        expected = before[row] if row in (0, 2) else before[row] * (1 - 0.1 * 0.5) - 0.1 * total.sign()
        assert torch.allclose(embedding.weights[row], expected)
    assert not embedding.gathered


def test_the_schedule_warms_up_then_falls_to_its_floor():
    rates = [learning_rate(step, 1.0, 10, 110, 0.1) for step in (1, 10, 60, 110, 200)]
    assert rates == pytest.approx([0.1, 1.0, 0.55, 0.1, 0.1])
    assert learning_rate(5000, 0.3, 10, 100, 1.0) == pytest.approx(0.3)


def test_ema_follows_its_formula_and_swaps_without_copies():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 3)
    ema = EMA(model, 0.9)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(5):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        ema.update()
        expected = {name: 0.9 * expected[name] + 0.1 * value for name, value in model.state_dict().items()}
    raw = {name: (value.clone(), value.data_ptr()) for name, value in model.named_parameters()}
    with ema.swapped_in():
        assert all(torch.allclose(value, expected[name], atol=1e-6) for name, value in model.named_parameters())
    assert all(torch.equal(value, raw[name][0]) and value.data_ptr() == raw[name][1] for name, value in model.named_parameters())


def test_five_steps_give_the_recorded_losses(fewshot, puzzle):
    """A golden curve: a change of the arithmetic, the sampling or the initial values shows here."""
    recorded = json.loads((Path(__file__).parent / "losses.json").read_text())
    plain = ["arch.pos_encodings=rope2d", "encoder.positions=rope2d"]
    for name, store, options in (("etrm", fewshot, []), ("etrm, plain positions", fewshot, plain), ("trm", puzzle, [])):
        assert Trainer(store, *options).steps(5) == pytest.approx(recorded[name], abs=2e-4), name


def test_a_non_finite_gradient_changes_nothing_but_the_step(fewshot):
    trainer = Trainer(fewshot)
    trainer.steps(2)
    weights = copy.deepcopy(trainer.state.model.state_dict())
    moments = copy.deepcopy(trainer.state.optimizers[0].state_dict()["state"])
    hook = trainer.state.model.lm_head.weight.register_hook(lambda gradient: gradient * math.nan)
    assert not train_step(trainer.state, trainer.batch(), trainer.settings).updated
    hook.remove()
    assert all(torch.equal(value, weights[name]) for name, value in trainer.state.model.state_dict().items())
    after = trainer.state.optimizers[0].state_dict()["state"]
    assert all(torch.equal(after[key]["exp_avg"], moments[key]["exp_avg"]) for key in moments)
    assert trainer.state.step == 3 and train_step(trainer.state, trainer.batch(), trainer.settings).updated


def test_the_logged_norm_is_the_one_before_clipping(fewshot):
    loose, tight = Trainer(fewshot, "grad_clip_norm=null"), Trainer(fewshot, "grad_clip_norm=0.001")
    norms = [train_step(t.state, t.batch(), t.settings).grad_norms["total"] for t in (loose, tight)]
    assert torch.equal(*norms) and norms[0] > 0.001


@pytest.mark.parametrize("layout", ["fewshot", "puzzle"])
def test_a_checkpoint_restores_everything(layout, fewshot, puzzle, tmp_path):
    store = {"fewshot": fewshot, "puzzle": puzzle}[layout]
    whole = Trainer(store)
    whole.steps(4)
    path = whole.state.save(tmp_path, ALONE, {}, keep=2)
    expected = whole.steps(4)
    resumed = Trainer(store, "seed=0")
    resumed.state.load(path, ALONE, CPU)
    assert resumed.steps(4) == expected
    for name, value in whole.state.model.state_dict().items():
        assert torch.equal(value, resumed.state.model.state_dict()[name]), name
    assert all(torch.equal(whole.state.ema.shadow[name], value) for name, value in resumed.state.ema.shadow.items())


def test_what_has_no_average_is_written_once_and_checkpoints_that_repeat_it_load(puzzle, tmp_path):
    trainer = Trainer(puzzle)
    trainer.steps(2)
    path = trainer.state.save(tmp_path, ALONE, {}, keep=2)
    whole = trainer.state.model.state_dict()
    raw, averaged = (load_file(path / checkpoint.WEIGHTS[which]) for which in ("raw", "ema"))
    assert averaged.keys() == whole.keys() and raw.keys() == trainer.state.ema.shadow.keys() and "context.weights" not in raw
    for _ in range(2):
        loaded = checkpoint.load_weights(path, "raw")
        assert loaded.keys() == whole.keys() and all(torch.equal(loaded[name], value) for name, value in whole.items())
        save_file(whole, path / checkpoint.WEIGHTS["raw"])  # as before
    trainer.state.ema = None
    path = trainer.state.save(tmp_path / "raw", ALONE, {}, keep=2)
    assert checkpoint.load_weights(path, "raw").keys() == whole.keys()


def test_old_checkpoints_are_deleted_and_a_failing_write_keeps_the_last(fewshot, tmp_path, monkeypatch):
    trainer = Trainer(fewshot)
    for _ in range(3):
        trainer.steps(1)
        trainer.state.save(tmp_path, ALONE, {}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_2", "step_3"]
    trainer.steps(1)

    def full_disk(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(UserError, match="No space left on device; earlier checkpoints are intact"):
        trainer.state.save(tmp_path, ALONE, {}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_2", "step_3"]
    assert checkpoint.latest(tmp_path).name == "step_3"


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_disk_that_is_full_only_at_the_last_moment_keeps_the_last_checkpoint(fewshot, tmp_path, monkeypatch, failing):
    trainer = Trainer(fewshot)
    trainer.steps(1)
    trainer.state.save(tmp_path, ALONE, {}, keep=2)
    trainer.steps(1)
    real = getattr(os, failing)

    def full_disk(target, *rest):
        name = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else str(target)
        if name.endswith(".step_2.tmp"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(target, *rest)

    monkeypatch.setattr(os, failing, full_disk)
    with pytest.raises(UserError, match="step_2: .*No space left on device; earlier checkpoints are intact"):
        trainer.state.save(tmp_path, ALONE, {}, keep=2)
    assert [path.name for path in tmp_path.iterdir()] == ["step_1"]


def arguments_for(store, output: Path, *overrides: str) -> list[str]:
    layout = [] if store.metadata.layout == "fewshot" else ["arch=trm", "data.augmentation=table", "arch.puzzle_emb_len=2"]
    return ["pretrain_etrm.py", *layout, *TINY, f"data.path={store.path}", f"output_dir={output}", "run_name=r", *overrides]


def train_here(store, output: Path, *overrides: str) -> Path:
    """A run in this process, as the command runs it; its folder."""
    pretrain_etrm.train(compose.load(PretrainConfig, "pretrain", arguments_for(store, output, *overrides)[1:]))
    return output / "r"


def weights_of(output: Path, step: int, which: str = "raw") -> dict[str, torch.Tensor]:
    return checkpoint.load_weights(output / "r" / "checkpoints" / f"step_{step}", which)


@pytest.mark.parametrize("layout", ["fewshot", pytest.param("puzzle", marks=pytest.mark.slow)])
def test_a_killed_and_resumed_run_ends_bitwise_like_an_undisturbed_one(layout, fewshot, puzzle, tmp_path):
    store = {"fewshot": fewshot, "puzzle": puzzle}[layout]
    options = ("train_steps=60", "checkpoint_interval=5", "lr=1e-3")
    train_here(store, tmp_path / "whole", *options)
    command = [sys.executable, *arguments_for(store, tmp_path / "killed", *options)]
    killed = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    folder = tmp_path / "killed" / "r" / "checkpoints"
    deadline = time.monotonic() + 120
    while checkpoint.latest(folder) is None and time.monotonic() < deadline:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    reached = checkpoint.load_info(checkpoint.latest(folder))["step"]
    assert 0 < reached < 60
    done = run(*command[1:])
    assert done.returncode == 0 and f"resumed at step {reached}" in done.stderr, done.stderr
    for which in ("raw", "ema"):
        whole, resumed = weights_of(tmp_path / "whole", 60, which), weights_of(tmp_path / "killed", 60, which)
        assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)


def train_both_ways(store, output: Path, steps: int) -> None:
    """A run of two processes in `two` and one of one process in `one`, compared: logged losses and weights."""
    options = (f"train_steps={steps}", f"checkpoint_interval={steps}")
    done = run(*arguments_for(store, output / "two", *options), world=2)
    assert done.returncode == 0, done.stderr
    train_here(store, output / "one", *options)
    lines = {name: (output / name / "r" / "metrics.jsonl").read_text().splitlines() for name in ("one", "two")}
    losses = {name: [json.loads(line)["train/lm_loss"] for line in lines[name]] for name in lines}
    assert len(losses["one"]) == steps and losses["one"] == pytest.approx(losses["two"], abs=1e-6)
    assert farthest(output / "one", output / "two", steps) <= 1e-6


def farthest(one: Path, other: Path, step: int) -> float:
    """The largest difference between weights of two runs."""
    ours, theirs = weights_of(one, step), weights_of(other, step)
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


def test_two_processes_train_puzzle_rows_like_one(puzzle, tmp_path):
    train_both_ways(puzzle, tmp_path, 5)


def test_two_processes_train_like_one_which_resumes_their_run(fewshot, tmp_path, capsys):
    train_both_ways(fewshot, tmp_path, 4)
    capsys.readouterr()
    train_here(fewshot, tmp_path / "two", "train_steps=8")
    assert "resumed at step 4" in capsys.readouterr().err
    train_here(fewshot, tmp_path / "whole", "train_steps=8")
    assert farthest(tmp_path / "whole", tmp_path / "two", 8) <= 1e-5


def test_resume_refuses_another_configuration_and_never_overwrites(fewshot, tmp_path):
    train_here(fewshot, tmp_path, "train_steps=2")
    before = weights_of(tmp_path, 2)
    with pytest.raises(UserError, match="lr: 0.0001 then, 0.5 now"):
        train_here(fewshot, tmp_path, "train_steps=4", "lr=0.5")
    with pytest.raises(UserError, match="resume=never would overwrite"):
        train_here(fewshot, tmp_path, "train_steps=4", "resume=never")
    assert all(torch.equal(before[name], value) for name, value in weights_of(tmp_path, 2).items())


def test_a_world_size_that_does_not_divide_the_batch_is_one_message(fewshot, tmp_path):
    done = run(*arguments_for(fewshot, tmp_path, "global_batch_size=7"), world=2)
    assert done.returncode == 1
    ours = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert ours == ["error: global_batch_size=7 is not divisible by the world size 2"]
    assert not (tmp_path / "r").exists()


def run_entry_point(tmp_path: Path, *body: str) -> subprocess.CompletedProcess:
    """Two processes under torchrun, each in an entry point with these lines."""
    head = ["import os, time", "from utils.errors import UserError, reports_user_errors", "@reports_user_errors", "def main():"]
    script = tmp_path / "job.py"
    script.write_text("\n".join([*head, *(f"    {line}" for line in body), "main()", ""]))
    return run(str(script), world=2)


def test_an_error_that_another_process_meets_alone_is_said(tmp_path):
    """The first process waits for the second, as in a collective."""
    alone = "if os.environ['RANK'] == '1': raise UserError('a disk of its own')"
    done = run_entry_point(tmp_path, alone, "time.sleep(60)")
    assert done.returncode == 1 and done.stderr.count("error (rank 1): a disk of its own") == 1, done.stderr


def test_the_first_process_speaks_even_if_it_is_slower(tmp_path):
    done = run_entry_point(tmp_path, "time.sleep(2 * (os.environ['RANK'] == '0'))", "raise UserError('a typo')")
    said = [line for line in done.stderr.splitlines() if "a typo" in line]
    assert done.returncode == 1 and said == ["error: a typo"], done.stderr


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs /proc to see the threads")
def test_leaving_the_group_ends_its_threads(tmp_path):
    script = tmp_path / "job.py"
    script.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "import torch\n"
        "from utils import distributed\n"
        "world = distributed.World.from_environment()\n"
        "distributed.start(world, torch.device('cpu'))\n"
        "torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))])\n"  # PyTorch imports much here
        "distributed.any_true(True)\n"
        "threads = lambda: sum('gloo' in (p / 'comm').read_text() for p in Path('/proc/self/task').iterdir())\n"
        "before = threads()\n"
        "distributed.close()\n"
        "Path(sys.argv[1], f'rank_{world.rank}').write_text(f'{before > 0} {threads()}')\n"
    )
    done = run(str(script), str(tmp_path), world=2)
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"rank_{rank}").read_text() for rank in range(2)] == ["True 0"] * 2


def test_a_read_only_or_full_output_is_one_message(fewshot, tmp_path, capsys):
    (tmp_path / "blocked").write_text("a file where the folder should be")
    with pytest.raises(SystemExit) as ended:
        reports_user_errors(train_here)(fewshot, tmp_path / "blocked")
    assert ended.value.code == 2 and "cannot write" in capsys.readouterr().err


@pytest.mark.slow
def test_shuffled_demonstrations_raise_the_loss_of_a_trained_model(tmp_path):
    """The model must have learned to read its demonstrations: colour permutations on 3x3 grids, seconds of training."""
    from dataset import store as datasets
    from dataset.build_rules_dataset import build, parse_arguments

    arguments = ["--families", "colour_permutation", "--stages", "1", "--test-splits", "test_rules", "--rows", "3", "3"]
    arguments += ["--columns", "3", "3", "--train-tasks", "16000", "--test-tasks", "64", "--output-dir", str(tmp_path / "d")]
    build(parse_arguments(arguments))
    store = datasets.load(tmp_path / "d")
    options = [
        "arch.H_cycles=1",
        "arch.halt_max_steps=1",
        "arch.hidden_size=64",
        "arch.num_heads=4",
        "global_batch_size=64",
        "encoder.num_layers=1",
        "encoder.positions=rope2d",
        "arch.pos_encodings=rope2d",
    ]
    options += ["data.buckets=[3]", "data.augmentation=none", "data.query_sampling=test", "data.min_demos=3", "data.max_demos=3"]
    trainer = Trainer(store, *options, "lr=3e-3", "weight_decay=0.01", "train_steps=250")
    trainer.steps(250)
    batch = trainer.batch()
    model = trainer.state.model.eval()
    from models.act import act_step, initial_carry
    from models.losses import act_loss

    def loss(data: dict) -> float:
        with torch.no_grad():
            _, metrics = act_loss(act_step(model, initial_carry(model, data), data), trainer.config.objective)
        return (metrics["lm_loss"] / metrics["rows"]).item()

    shuffled = {name: value.roll(1, 0) if name.startswith("demo") else value for name, value in batch.data.items()}
    assert loss(shuffled) > 2 * loss(batch.data) + 0.5


def test_wandb_works_without_an_account(fewshot, tmp_path):
    done = run(*arguments_for(fewshot, tmp_path, "train_steps=2", "logging.wandb=offline"), env={"WANDB_SILENT": "true"})
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "r" / "wandb").glob("offline-run-*"))
    shutil.rmtree(tmp_path / "r")
