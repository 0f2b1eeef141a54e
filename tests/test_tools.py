"""Commands of a user's day: looking into checkpoints, averaging them, working through a list of commands."""

import json
import signal
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from evaluation.solver import Solver
from tests.support.runs import evaluate_here, run, train_here, without_digests
from tools import checkpoint as tool
from tools import jobs
from utils import checkpoint
from utils.errors import Stopped, UserError
from utils.files import sha256_of


@pytest.fixture(scope="module")
def trained(fewshot, tmp_path_factory):
    return train_here(
        fewshot, tmp_path_factory.mktemp("t"), "train_steps=4", "checkpoint_interval=2", "lr=1e-2"
    )


def test_inspect_says_what_a_checkpoint_holds(trained, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["checkpoint", "inspect", str(trained), "--json"])
    tool.main()
    about = json.loads(capsys.readouterr().out)
    weights = load_file(trained / "checkpoints/step_4/ema.safetensors")
    assert about["step"] == 4 and about["damage"] is None and about["config"]["arch"]["name"] == "etrm"
    assert about["weights"].keys() == {"raw", "ema"} and about["weights"]["ema"].keys() == weights.keys()
    found = about["weights"]["ema"]["lm_head.weight"]
    assert found["shape"] == list(weights["lm_head.weight"].shape) and found["not_finite"] == 0
    assert found["mean"] == pytest.approx(weights["lm_head.weight"].double().mean().item())
    assert found["max"] == pytest.approx(weights["lm_head.weight"].max().item())
    text = "\n".join(tool.lines_of(tool.inspect(trained)))
    assert "step 4, arch etrm, encoder memory" in text and "damage: none" in text and "0 not finite" in text


def test_inspect_counts_numbers_that_are_not_finite_and_names_damage(trained, tmp_path, capsys, monkeypatch):
    path = tmp_path / "step_4"
    path.mkdir()
    for file in (trained / "checkpoints/step_4").iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    weights = load_file(path / "ema.safetensors")
    weights["lm_head.weight"][0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    save_file(weights, path / "ema.safetensors")
    monkeypatch.setattr(sys, "argv", ["checkpoint", "inspect", str(path)])
    with pytest.raises(SystemExit) as ended:
        tool.main()
    assert ended.value.code == 2 and "ema.safetensors is damaged" in capsys.readouterr().out
    without_digests(path)
    with pytest.raises(SystemExit):
        tool.main()
    said = capsys.readouterr().out
    assert "lm_head.weight: 3 not finite" in said and "damage: none" in said
    assert tool.inspect(path)["weights"]["ema"]["lm_head.weight"]["mean"] is not None


def test_inspect_reads_a_state_dict_of_the_original(tmp_path):
    torch.save({"_orig_mod.model.inner.lm_head.weight": torch.arange(6.0).view(2, 3)}, tmp_path / "step_1")
    about = tool.inspect(tmp_path / "step_1")
    assert about["weights"]["the file's"]["lm_head.weight"]["mean"] == 2.5
    with pytest.raises(UserError, match="does not exist"):
        tool.inspect(tmp_path / "nowhere")


def test_an_average_is_the_mean_of_the_weights_and_can_be_evaluated_and_asked(trained, fewshot, tmp_path):
    steps = [trained / "checkpoints" / name for name in ("step_2", "step_4")]
    path = tool.average(steps, tmp_path / "mean")
    one, other = (checkpoint.load_weights(step, "ema") for step in steps)
    mean = checkpoint.load_weights(path, "ema")
    for name, value in mean.items():
        assert torch.allclose(value, (one[name] + other[name]) / 2, atol=1e-7), name
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])
    origin = checkpoint.load_info(path)["average_of"]
    assert [one["path"] for one in origin] == [str(step) for step in steps]
    assert [one["step"] for one in origin] == [2, 4] and {one["weights"] for one in origin} == {"ema"}
    assert [one["sha256"] for one in origin] == [sha256_of(step / "ema.safetensors") for step in steps]
    raw = checkpoint.load_weights(tool.average(steps, tmp_path / "raw", "raw"), "ema")["lm_head.weight"]
    assert torch.allclose(
        raw, sum(checkpoint.load_weights(step, "raw")["lm_head.weight"] for step in steps) / 2
    )
    assert checkpoint.damage(path) == ""
    evaluate_here(f"checkpoint={tmp_path / 'mean'}", "num_views=1", "controls=[]")
    Solver.from_pretrained(tmp_path / "mean", device="cpu").solve(fewshot.task(0), num_views=1)


def test_an_average_of_different_models_is_refused(trained, fewshot, tmp_path):
    wider = train_here(fewshot, tmp_path, "train_steps=1", "arch.L_cycles=2")
    with pytest.raises(UserError, match="another model .* settings of arch differ"):
        tool.average([trained, wider], tmp_path / "mean")
    assert not (tmp_path / "mean").exists()


def test_a_list_is_worked_through_once_in_order_and_keeps_its_marks(tmp_path, monkeypatch):
    listed, out = tmp_path / "list.txt", tmp_path / "out"
    lines = ["# first", f"[x] echo x >> {out}", "", f"echo a >> {out}", "[ ] false", f"[-] echo b >> {out}"]
    listed.write_text("\n".join(lines) + "\n")
    assert jobs.work(listed, retry=False) == (2, 1)
    assert out.read_text().split() == ["a", "b"]
    marks = [line[:3] for line in listed.read_text().splitlines()]
    assert marks == ["# f", "[x]", "", "[x]", "[!]", "[x]"]
    assert jobs.work(listed, retry=False) == (0, 0) and jobs.work(listed, retry=True) == (0, 1)
    assert out.read_text().split() == ["a", "b"]


def test_lines_added_while_the_list_is_worked_through_are_run_too(tmp_path):
    listed, out = tmp_path / "list.txt", tmp_path / "out"
    listed.write_text(f"echo 'echo late >> {out}' >> {listed}\n")
    assert jobs.work(listed, retry=False) == (2, 0) and out.read_text() == "late\n"


def test_a_signal_reaches_the_command_and_the_list_goes_on_where_it_was(tmp_path, monkeypatch):
    listed, out = tmp_path / "list.txt", tmp_path / "out"
    code = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(75)); "
    code += "print(1, flush=True); time.sleep(60)"
    listed.write_text(f"{sys.executable} -c '{code}' > {out}\necho never\n")
    real = jobs.subprocess.Popen.wait

    def wait(process, *arguments):
        while not (out.is_file() and out.read_text()):
            time.sleep(0.05)
        signal.raise_signal(signal.SIGTERM)
        return real(process, *arguments)

    monkeypatch.setattr(jobs.subprocess.Popen, "wait", wait)
    with pytest.raises(Stopped, match="the same queue continues it"):
        jobs.work(listed, retry=False)
    assert [line[:3] for line in listed.read_text().splitlines()] == ["[-]", "[ ]"]


def test_the_list_that_is_not_there_is_one_line(tmp_path):
    done = run("-m", "tools.jobs", str(tmp_path / "list.txt"))
    assert (
        done.returncode == 2 and done.stderr.startswith("error: cannot read") and done.stderr.count("\n") == 1
    )
