"""Other systems' files become checkpoints that answer as the files do; checkpoints are compared."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from config import compose
from dataset.games import GAMES
from evaluation.session import EvaluateConfig, Session
from models.act import solve
from models.context import Context
from models.foreign import read_foreign
from models.pretrained import load_checkpoint
from tests.golden.check import build_case
from tests.support import nano_trm, toy_game
from tests.support.architectures import GOLDEN
from tests.support.runs import called, train_here
from tools import checkpoint as tool
from tools import checkpoint_diff
from tools.checkpoint_convert import convert
from utils import checkpoint
from utils.errors import UserError

CASES = sorted(path.name.removesuffix(".checkpoint.pt") for path in GOLDEN.glob("*.checkpoint.pt"))


def original(case: str, folder: Path, **changes) -> Path:
    """The file of a recorded model, with its configuration beside it as the original writes it."""
    settings = json.loads((GOLDEN / f"{case}.config.json").read_text())
    name = settings.pop("name", "trm")
    known = {"loss": {"name": "losses@ACTLossHead", "loss_type": "stablemax_cross_entropy"}}
    arch = {"name": f"recursive_reasoning.{name}@Model", **known, **settings, **changes}
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save({"arch": arch, "lr": 1e-4}, folder / "all_config.yaml")
    shutil.copy(GOLDEN / f"{case}.checkpoint.pt", folder / "step_7")
    return folder / "step_7"


@pytest.mark.parametrize("case", CASES)
def test_a_converted_original_answers_bitwise_as_its_file(case, tmp_path):
    path = convert(original(case, tmp_path / case), tmp_path / "run", None, None, [])
    ours, info = load_checkpoint(checkpoint.resolve(tmp_path / "run"), "ema")
    theirs = build_case(GOLDEN / case).eval()
    cells = json.loads((GOLDEN / f"{case}.config.json").read_text())["seq_len"]
    generator = torch.Generator().manual_seed(0)
    data = {
        "inputs": torch.randint(0, 12, (3, cells), generator=generator),
        "puzzle_identifiers": torch.tensor([0, 2, 8]),
    }
    found, expected = solve(ours, data), solve(theirs, data)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.q_halt_logits, expected.q_halt_logits)
    assert info["step"] == 7 and info["converted_from"]["kind"] == (
        "HRM" if case == "hrm" else "original TRM"
    )
    assert checkpoint.damage(path) == ""


NANO = {
    "attention": {},
    "one row": {"puzzle_emb_dim": 24, "puzzle_emb_len": 2},
    "mixer": {"pos_emb_type": None, "use_mlp_t": True},
    "small Sudoku": {"vocab_size": 7, "max_grid_size": 4, "seq_len": 16},
    "maze": {"vocab_size": 6, "max_grid_size": 5, "seq_len": 25},
}


@pytest.mark.parametrize("changes", NANO.values(), ids=NANO)
@pytest.mark.parametrize("which", ["raw", "ema"])
def test_a_converted_nano_trm_answers_as_its_file(which, changes, tmp_path):
    content = nano_trm.checkpoint_of(0, **changes)
    torch.save(content, tmp_path / "last.ckpt")
    path = convert(tmp_path / "last.ckpt", tmp_path / "run", None, None, [])
    model, info = load_checkpoint(path, which)
    settings, generator = content["hyper_parameters"], torch.Generator().manual_seed(1)
    maze, side = settings["vocab_size"] == 6, settings["max_grid_size"]
    # A Sudoku's digits are one token later there, behind an end of the grid.
    ours = torch.randint(1, 6 if maze else 2 + side, (4, settings["seq_len"]), generator=generator)
    theirs = ours if maze else ours + 1
    expected, halting = nano_trm.answers_of(content, theirs, averaged=which == "ema")
    output = solve(model, {"inputs": ours, "puzzle_identifiers": torch.zeros(4, dtype=torch.long)})
    shared = expected if maze else torch.cat((expected[..., :1], expected[..., 2:]), -1)
    assert torch.allclose(output.logits[..., : shared.shape[-1]], shared, atol=1e-5)
    assert torch.equal(output.logits[..., : shared.shape[-1]].argmax(-1), shared.argmax(-1))
    answered = shared.argmax(-1) > 0  # where padding wins, so may a digit that their Sudokus lack
    assert torch.equal(output.logits.argmax(-1)[answered], shared.argmax(-1)[answered])
    assert torch.allclose(output.q_halt_logits, halting, atol=1e-5)
    assert info["step"] == 120 and info["data"]["game"] == ("maze" if maze else "sudoku")
    assert model.vocabulary == GAMES[info["data"]["game"]].vocabulary


def test_a_game_of_ones_own_takes_no_file_of_another_system(tmp_path, monkeypatch):
    assert toy_game.GAME.vocabulary == GAMES["sudoku"].vocabulary
    monkeypatch.setitem(GAMES, toy_game.GAME.name, toy_game.GAME)
    torch.save(nano_trm.checkpoint_of(0), tmp_path / "last.ckpt")
    assert read_foreign(tmp_path / "last.ckpt").game == "sudoku"


def test_a_converted_nano_trm_is_evaluated_and_started_from(tmp_path, monkeypatch, capsys):
    called(monkeypatch, sudoku_main(), "--size", "4", "--train-puzzles", "4", "--test-puzzles", "4",
           "--workers", "1", "--output-dir", tmp_path / "data")  # fmt: skip
    content = nano_trm.checkpoint_of(0, vocab_size=7, max_grid_size=4, seq_len=16)
    torch.save(content, tmp_path / "last.ckpt")
    words = ["convert", tmp_path / "last.ckpt", "--output", tmp_path / "run", "--data", tmp_path / "data"]
    called(monkeypatch, tool.main, *words, "--overrides", "data.buckets=[4]")
    said = capsys.readouterr().out
    assert f"python evaluate.py checkpoint={tmp_path / 'run'}" in said
    words = [f"checkpoint={tmp_path / 'run'}", "device=cpu", "controls=[]"]
    evaluation = Session.open(compose.load(EvaluateConfig, "evaluate", words)).evaluate()
    assert evaluation.counts["queries"] == 4 and evaluation.protocol == "transductive"


def sudoku_main():
    from dataset import build_sudoku_dataset

    return build_sudoku_dataset.main


def test_rows_go_to_the_puzzles_of_the_same_name(puzzle, tmp_path, capsys):
    file = original("trm_attention", tmp_path / "o", forward_dtype="float32")
    names = ["<blank>", *puzzle.identifiers[1:6], "x", "y", "z"]
    (file.parent / "identifiers.json").write_text(json.dumps(names))
    path = convert(file, tmp_path / "run", puzzle.path, None, ["data.canvas=full"])
    model, info = load_checkpoint(path, "ema")
    rows = read_foreign(file).weights["context.weights"]
    assert model.context.weights.shape[0] == puzzle.metadata.num_puzzle_identifiers
    assert torch.equal(model.context.weights[1:6], rows[1:6]) and not model.context.weights[6:].any()
    assert info["data"]["hash"] == puzzle.metadata.content_hash
    assert "6 of" in capsys.readouterr().out


def etrm_file(folder: Path) -> Path:
    """A first ETRM's: the recursion of a recorded TRM, with an encoder in the place of its rows."""
    file = original("trm_attention", folder, name="recursive_reasoning.etrm@Model", encoder_type="standard")
    state = torch.load(file, weights_only=True)
    del state["_orig_mod.model.inner.puzzle_emb.weights"]
    state["_orig_mod.model.encoder.set_encoder.query_tokens"] = torch.ones(16, 64)
    torch.save(state, file)
    return file


def test_of_a_first_etrm_the_recursion_is_kept_bitwise_beside_a_new_encoder(tmp_path):
    file = etrm_file(tmp_path / "o")
    with pytest.raises(UserError, match="is a first ETRM's: its encoder .* --fresh-encoder NAME keeps"):
        convert(file, tmp_path / "run", None, None, [])
    path = convert(file, tmp_path / "run", None, "standard", [])
    ours, info = load_checkpoint(path, "ema")
    theirs = build_case(GOLDEN / "trm_attention").eval()
    assert info["config"]["encoder"]["name"] == "standard" and info["data"]["layout"] == "fewshot"
    context = Context(prefix=torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(0)))
    inputs = torch.randint(0, 12, (2, 100), generator=torch.Generator().manual_seed(1))
    outputs = []
    for model in (ours, theirs):
        states = tuple(state.expand(2, 116, 64) for state in model.initial_states())
        outputs.append(model(states, {"inputs": inputs}, context))
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    assert torch.equal(outputs[0].states[1], outputs[1].states[1])
    with pytest.raises(UserError, match="is no first ETRM's"):
        convert(original("hrm", tmp_path / "h"), tmp_path / "other", None, "standard", [])


def without(key: str):
    return lambda content: content["hyper_parameters"].pop(key)


def setting(**values):
    return lambda content: content["hyper_parameters"].update(values)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (setting(pos_emb_type="2d"), "trained with pos_emb_type=2d and rope_theta=10000, which have no"),
        (setting(use_conv_swiglu=True), "trained with use_conv_swiglu=True, which has no counterpart here"),
        (setting(vocab_size=11), "has 11 tokens for grids of side 9: neither a Sudoku's nor a maze's"),
        (without("num_layers"), "does not say what num_layers was in its training"),
        (lambda content: content["state_dict"].clear(), "is a checkpoint of Lightning, but not one of nano"),
        (lambda content: content["state_dict"].pop("lm_head.weight"), "lm_head.weight"),
    ],
)  # fmt: skip
def test_a_nano_trm_without_a_counterpart_is_refused_in_one_line(
    change, words, tmp_path, monkeypatch, capsys
):
    content = nano_trm.checkpoint_of(0)
    change(content)
    torch.save(content, tmp_path / "last.ckpt")
    with pytest.raises(SystemExit) as ended:
        called(monkeypatch, tool.main, "convert", tmp_path / "last.ckpt", "--output", tmp_path / "run")
    said = capsys.readouterr().err
    assert ended.value.code == 2 and words in said and said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_an_original_without_its_configuration_is_refused(tmp_path):
    file = original("hrm", tmp_path / "o")
    (file.parent / "all_config.yaml").unlink()
    with pytest.raises(UserError, match="has no all_config.yaml beside it"):
        convert(file, tmp_path / "run", None, None, [])


def test_inspect_tells_whose_file_it_is(tmp_path, capsys, monkeypatch):
    torch.save(nano_trm.checkpoint_of(0), tmp_path / "last.ckpt")
    files = {
        tmp_path / "last.ckpt": "a file of nano-trm",
        original("hrm", tmp_path / "h"): "a file of HRM",
        original("trm_attention", tmp_path / "t"): "a file of original TRM",
        etrm_file(tmp_path / "e"): "a file of first ETRM",
    }
    for file, words in files.items():
        called(monkeypatch, tool.main, "inspect", file)
        said = capsys.readouterr().out
        assert words in said.splitlines()[0] and "L_cycles" in said
    convert(tmp_path / "last.ckpt", tmp_path / "run", None, None, [])
    called(monkeypatch, tool.main, "inspect", tmp_path / "run")
    assert f"converted from {tmp_path / 'last.ckpt'}, a file of nano-trm" in capsys.readouterr().out


@pytest.fixture(scope="module")
def trained(fewshot, tmp_path_factory):
    folder = tmp_path_factory.mktemp("d")
    return [
        train_here(fewshot, folder / name, "train_steps=2", "lr=1e-2", *more)
        for name, more in (("a", []), ("b", ["weight_decay=0.5", "freeze_decoder_steps=all"]))
    ]


def test_diff_tells_settings_and_the_norm_of_every_difference(trained, capsys, monkeypatch):
    first, second = (checkpoint_diff.held(path, "raw") for path in trained)
    found = checkpoint_diff.diff(first, second)
    assert found["settings"]["weight_decay"] == [0.1, 0.5] and "lr" not in found["settings"]
    assert not found["shapes"] and not found["only_first"]
    assert {*found["weights"], *found["equal"]} == set(first.weights)
    for name, row in found["weights"].items():
        difference = (first.weights[name] - second.weights[name]).double()
        assert row["norm"] == pytest.approx(difference.norm().item(), rel=1e-5)
        assert row["largest"] == pytest.approx(difference.abs().max().item(), rel=1e-5)
        assert row["relative"] == pytest.approx(row["norm"] / first.weights[name].norm().item(), rel=1e-5)
    assert "H_init" in found["equal"] and "lm_head.weight" in found["weights"]
    called(monkeypatch, tool.main, "diff", *trained)
    said = capsys.readouterr().out
    assert "weight_decay: 0.1 -> 0.5" in said and "tensors differ" in said
    called(monkeypatch, tool.main, "diff", trained[0], trained[0], "--json")
    same = json.loads(capsys.readouterr().out)
    assert not same["settings"] and not same["weights"]


def test_diff_compares_a_file_with_what_it_was_converted_to(tmp_path):
    file = original("trm_attention", tmp_path / "o")
    path = convert(file, tmp_path / "run", None, None, [])
    found = checkpoint_diff.diff(checkpoint_diff.held(file), checkpoint_diff.held(path))
    assert not found["weights"] and not found["settings"].keys() - {"arch.name"}
