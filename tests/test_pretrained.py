"""Weights from elsewhere: original files, published checkpoints, the decoder or all of another run."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from config import compose
from config.schema import PretrainConfig
from dataset.batch import DataSizes
from dataset.leaks import UNKNOWN_PAIRS
from models.act import solve
from models.core import RecursiveModel
from models.foreign import load_original
from models.pretrained import load_checkpoint, load_decoder, pairs_behind
from models.trm import build_model
from tests.support.architectures import CYCLES, GOLDEN, config_of
from tests.support.grids import write_store
from tests.support.models import SIDE
from tests.support.runs import ROOT, evaluate_here, load_config
from tools import published
from utils import checkpoint
from utils.errors import UserError
from utils.files import read_json

DECODER = [
    "arch.hidden_size=64",
    "arch.num_heads=4",
    "arch.H_cycles=3",
    "arch.L_cycles=4",
    "arch.pos_encodings=rope",
    "data.buckets=[10]",
]


def decoder_config(path: Path, *overrides: str) -> PretrainConfig:
    return config_of(*DECODER, f"load_pretrained_decoder={path}", *overrides)


def decoder_model(config: PretrainConfig) -> RecursiveModel:
    torch.manual_seed(1)
    return build_model(config.arch, DataSizes(12, 9, 100), config.encoder)


@pytest.fixture
def original(tmp_path) -> Path:
    """An original TRM's file with its configuration and its puzzles' names beside it."""
    shutil.copy(GOLDEN / "trm_attention.checkpoint.pt", tmp_path / "step_1")
    arch = {
        "name": "recursive_reasoning.trm@TinyRecursiveReasoningModel_ACTV1",
        "H_cycles": 3,
        "L_cycles": 4,
        "pos_encodings": "rope",
    }
    OmegaConf.save({"arch": {**arch, "num_heads": 4}}, tmp_path / "all_config.yaml")
    (tmp_path / "identifiers.json").write_text('["<blank>", "a", "b", "c", "d", "e", "f", "g", "h"]')
    return tmp_path / "step_1"


@pytest.mark.parametrize("naming", ["original", "ETRM", "plain"])
def test_a_decoder_is_loaded_from_every_naming_and_no_row_or_encoder_is(naming, original):
    state = torch.load(original, weights_only=True)
    if naming == "ETRM":
        state["_orig_mod.model.encoder.query_tokens"] = torch.zeros(16, 64)
        del state["_orig_mod.model.inner.puzzle_emb.weights"]
    elif naming == "plain":
        state = {name.removeprefix("_orig_mod.model.inner."): value for name, value in state.items()}
    torch.save(state, original)
    config = decoder_config(original)
    model = decoder_model(config)
    before = {name: value.clone() for name, value in model.context.state_dict().items()}
    report = load_decoder(model, config, [])
    theirs = {
        name.removeprefix("_orig_mod.").removeprefix("model.inner."): value for name, value in state.items()
    }
    own = model.state_dict()
    for name in (
        "L_level.layers.1.mlp.down_proj.weight",
        "H_init",
        "L_init",
        "q_head.bias",
        "lm_head.weight",
    ):
        assert torch.equal(own[name], theirs[name].float()) and name in report.loaded
    assert torch.equal(own["embed_tokens.weight"], theirs["embed_tokens.embedding_weight"])
    assert all(torch.equal(model.context.state_dict()[name], value) for name, value in before.items())
    assert len(report.skipped) == 1 and all(name.startswith("context.") for name in report.missing)
    assert {*report.loaded, *report.missing} == set(own)
    assert "compared" in report.summary() and "14 tensors loaded, 1 skipped" in report.summary()


@pytest.mark.parametrize("override, words", [
    ("arch.L_cycles=6", "arch.L_cycles=4 there, 6 here"),
    ("arch.num_heads=8", "arch.num_heads=4 there, 8 here"),
    ("arch.pos_encodings=rope2d", "arch.pos_encodings=rope there, rope2d here"),
    ("arch.L_layers=3", "L_level.layers.2.mlp.down_proj.weight is not in the file"),
    ("arch.expansion=8", "has shape (512, 64) there, (1024, 64) here"),
])  # fmt: skip
def test_other_arithmetic_than_the_weights_were_trained_with_is_refused_and_changes_nothing(
    override, words, original
):
    config = decoder_config(original, override)
    model = decoder_model(config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match=re.escape(words)):
        load_decoder(model, config, [])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    allowed = decoder_config(original, override, "pretrained_mismatch=allow")
    report = load_decoder(model, allowed, [])
    assert any(words in text for text in report.differing) and "differs:" in report.summary()
    assert "H_init" in report.loaded


def test_another_recursion_is_refused_although_its_shapes_fit(original):
    config = decoder_config(original, "arch=trm_singlez", "encoder=memory")
    with pytest.raises(UserError, match="arch=trm there, trm_singlez here"):
        load_decoder(decoder_model(config), config, [])


@pytest.mark.parametrize(
    "name",
    [
        "recursive_reasoning.hrm@HierarchicalReasoningModel_ACTV1",
        "hrm.hrm_act_v1@HierarchicalReasoningModel_ACTV1",
    ],
)
def test_hrm_is_known_by_the_names_of_both_its_repositories(name, tmp_path):
    shutil.copy(GOLDEN / "hrm.checkpoint.pt", tmp_path / "step_1")
    arch = {"name": name, "H_cycles": 2, "L_cycles": 2, "num_heads": 2, "pos_encodings": "rope"}
    OmegaConf.save({"arch": arch}, tmp_path / "all_config.yaml")
    options = ["arch.hidden_size=16", "arch.num_heads=2", "data.buckets=[6]", "pretrained_puzzle_rows=skip"]
    options += ["arch=hrm", *CYCLES["hrm"], f"load_pretrained_decoder={tmp_path / 'step_1'}"]
    config = config_of(*options)
    report = load_decoder(decoder_model(config), config, [])
    assert not report.differing and report.missing == ["context.weights"]
    config = config_of(*options, "arch.L_cycles=3")
    with pytest.raises(UserError, match="arch.L_cycles=2 there, 3 here"):
        load_decoder(decoder_model(config), config, [])


def test_a_file_without_configuration_says_that_nothing_was_compared(original):
    (original.parent / "all_config.yaml").unlink()
    config = decoder_config(original, "arch.L_cycles=2")
    assert "could not be compared" in load_decoder(decoder_model(config), config, []).summary()


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
    ],
)
def test_puzzle_rows_go_to_the_puzzles_of_the_same_name(device, original):
    config = decoder_config(original, "arch=trm")
    model = decoder_model(config).to(device)
    names = ["<blank>", "h", "new", "a", "b", "other", "c", "d", "e"]
    report = load_decoder(model, config, names)
    theirs = torch.load(original, weights_only=True)["_orig_mod.model.inner.puzzle_emb.weights"].float()
    rows = model.context.weights.cpu()
    assert torch.equal(rows[1], theirs[8]) and torch.equal(rows[3], theirs[1])
    assert not rows[2].any() and not rows[5].any() and "7 of 9 puzzle rows matched" in report.settings


def test_an_originals_weights_are_evaluated_as_they_are(original, puzzle, tmp_path):
    from pretrain_etrm import train

    names = ["<blank>", *reversed(puzzle.identifiers[1:])]
    state = torch.load(original, weights_only=True)
    state["_orig_mod.model.inner.puzzle_emb.weights"] = torch.randn(
        len(names), 64, generator=torch.Generator().manual_seed(0)
    )
    torch.save(state, original)
    (tmp_path / "identifiers.json").write_text(json.dumps(names))
    options = [
        *DECODER[:-1],
        "arch.puzzle_emb_len=16",
        f"load_pretrained_decoder={original}",
        f"output_dir={tmp_path}",
        "run_name=run",
    ]
    config = load_config(puzzle, *options, "train_steps=0")
    train(config)
    evaluate_here(f"checkpoint={tmp_path / 'run'}", "num_views=1", "report=false", "controls=[]")
    assert (tmp_path / "run/evaluations/step_0-ema-test/results.json").is_file()
    theirs = build_model(config.arch, DataSizes(12, len(names), SIDE**2), None).eval()
    theirs.load_state_dict(load_original(original))
    ours, _ = load_checkpoint(checkpoint.resolve(tmp_path / "run"), "ema")
    inputs = torch.randint(0, 12, (4, SIDE**2), generator=torch.Generator().manual_seed(1))
    rows = torch.tensor([0, 1, 2, len(names) - 1])
    their_rows = torch.tensor([names.index(puzzle.identifiers[row]) for row in rows.tolist()])
    answers = [
        solve(model, {"inputs": inputs, "puzzle_identifiers": its_rows}).logits
        for model, its_rows in ((ours, rows), (theirs, their_rows))
    ]
    assert torch.equal(*answers) and not torch.equal(rows, their_rows)
    train(load_config(puzzle, *options, "train_steps=1"))  # the same run goes on from there
    assert checkpoint.latest(tmp_path / "run/checkpoints").name == "step_1"


@pytest.mark.parametrize("name", published.CHECKPOINTS)
def test_the_command_that_is_printed_for_a_published_checkpoint_fits_it(name, original):
    options = shlex.split(published.start_from(original, published.CHECKPOINTS[name].data))[2:]
    small = ["arch.hidden_size=64", "arch.num_heads=4", "arch.forward_dtype=float32"]
    config = compose.load(PretrainConfig, "pretrain", [*options, *small])
    assert not load_decoder(decoder_model(config), config, []).differing


def test_puzzle_rows_without_names_are_refused(original):
    config = decoder_config(original, "arch=trm")
    for blank in (1, 5):
        with pytest.raises(UserError, match="none of the puzzles"):
            load_decoder(decoder_model(config), config, ["<blank>"] * blank + ["x", "y"])
    (original.parent / "identifiers.json").unlink()
    with pytest.raises(UserError, match="no identifiers.json to say whose they are"):
        load_decoder(decoder_model(config), config, ["<blank>", "a"])
    config = decoder_config(original, "arch=trm", "pretrained_puzzle_rows=skip")
    model = decoder_model(config)
    load_decoder(model, config, ["<blank>", "a"])
    assert not model.context.weights.any()


def test_a_run_starts_from_another_runs_averaged_decoder_and_reports_every_weight(
    fewshot, puzzle, tmp_path, capfd
):
    from pretrain_etrm import train

    common = [
        "train_steps=1",
        f"output_dir={tmp_path}",
        "arch.pos_encodings=rope",
        "lr=0.1",
        "logging.wandb=disabled",
    ]
    train(load_config(puzzle, *common, "run_name=first"))
    source = tmp_path / "first" / "checkpoints" / "step_1"
    start = [*common, f"load_pretrained_decoder={tmp_path / 'first'}", "lr=0", "weight_decay=0"]
    train(load_config(fewshot, *start, "run_name=second"))
    from safetensors.torch import load_file

    averaged, started = (
        load_file(source / "ema.safetensors"),
        load_file(tmp_path / "second/checkpoints/step_1/ema.safetensors"),
    )
    raw = checkpoint.load_weights(source, "raw")
    name = "L_level.layers.0.self_attn.o_proj.weight"
    assert torch.allclose(started[name], averaged[name], atol=1e-6) and not torch.allclose(
        started[name], raw[name], atol=1e-6
    )
    report = OmegaConf.load(tmp_path / "second" / "pretrained_decoder.json")
    assert report.weights == "ema" and name in report.loaded and "context.weights" in report.skipped
    assert all(missing.startswith("context.") for missing in report.missing)
    assert "ema weights" in capfd.readouterr().err
    train(load_config(puzzle, *start, "run_name=third"))
    third = checkpoint.load_weights(tmp_path / "third/checkpoints/step_1", "raw")
    assert third[name].shape == raw[name].shape and torch.allclose(
        third["context.weights"][2:], averaged["context.weights"][2:], atol=2e-2
    )


def test_a_run_goes_on_with_a_whole_model_on_other_data(fewshot, tmp_path, capfd):
    from safetensors.torch import load_file

    from pretrain_etrm import train

    other = write_store(tmp_path / "other", seed=1)
    common = ["train_steps=1", f"output_dir={tmp_path}", "lr=0.1", "logging.wandb=disabled"]
    train(load_config(fewshot, *common, "run_name=first"))
    start = [
        *common,
        f"load_pretrained_decoder={tmp_path / 'first'}",
        "pretrained_encoder=load",
        "lr=0",
        "weight_decay=0",
    ]
    train(load_config(other, *start, "run_name=second"))
    averaged, started = (
        load_file(tmp_path / name / "checkpoints/step_1/ema.safetensors") for name in ("first", "second")
    )
    assert averaged.keys() == started.keys() and any(name.startswith("context.") for name in started)
    assert all(torch.allclose(started[name], value, atol=1e-6) for name, value in averaged.items())
    report = OmegaConf.load(tmp_path / "second" / "pretrained_decoder.json")
    assert report.missing == [] and report.skipped == {}
    first, second = (
        checkpoint.load_trained_pairs(tmp_path / name / "checkpoints/step_1") for name in ("first", "second")
    )
    assert set(first) < set(second), "what the first weights were trained on counts as seen"
    train(load_config(other, *start, "run_name=second", "train_steps=2"))
    assert set(checkpoint.load_trained_pairs(tmp_path / "second" / "checkpoints" / "step_2")) == set(second)
    assert pairs_behind(Path("original.pt")) == UNKNOWN_PAIRS
    with pytest.raises(UserError, match="has no checkpoint with a score"):
        train(
            load_config(
                other, *start, f"load_pretrained_decoder={tmp_path / 'first' / 'best'}", "run_name=third"
            )
        )
    with pytest.raises(UserError, match="encoder.num_layers=2 there, 1 here"):
        train(load_config(other, *start, "encoder.num_layers=1", "run_name=third"))
    with pytest.raises(UserError, match="arch.halt_pooling=first there, mean here"):
        train(load_config(other, *start, "arch.halt_pooling=mean", "run_name=third"))
    with pytest.raises(UserError, match="encoder.name=memory there, standard here"):
        train(load_config(other, *start, "encoder=standard", "run_name=third"))


def test_a_checkpoint_that_is_older_than_relations_is_compared_as_one_without_them(fewshot):
    (folder,) = (ROOT / "pretrained/rules/checkpoints").glob("*")
    theirs = checkpoint.load_info(folder)["config"]
    assert "relations" not in theirs["arch"] and "draft_places" not in theirs["encoder"]
    alike = [
        f"arch.{key}={theirs['arch'][key]}" for key in ("hidden_size", "num_heads", "H_cycles", "L_cycles")
    ] + [f"load_pretrained_decoder={folder}"]
    load = [*alike, "encoder=memory", "pretrained_encoder=load"]

    def loaded(*overrides):
        config = load_config(fewshot, *load, *overrides)
        sizes = DataSizes(12, 1, SIDE**2)
        return load_decoder(build_model(config.arch, sizes, config.encoder), config, [])

    assert not loaded().differing
    for overrides, words in (
        (["arch.relations=[lines]"], r"arch.relations=\[\] there, \['lines'\] here"),
        (["encoder.relations=[lines]"], r"encoder.relations=\[\] there, \['lines'\] here"),
        (["encoder.colour_path=true"], "encoder.colour_path=False there, True here"),
    ):
        with pytest.raises(UserError, match=words):
            loaded(*overrides)


def test_a_run_that_is_older_than_some_settings_is_resumed(fewshot, tmp_path):
    from pretrain_etrm import train

    common = ["encoder=memory", f"output_dir={tmp_path}", "run_name=old", "logging.wandb=disabled"]
    train(load_config(fewshot, *common, "train_steps=1"))
    checkpoints = tmp_path / "old/checkpoints"
    info = checkpoints / "step_1/info.json"
    written = read_json(info)
    del written["sha256"]["info.json"]
    for key in ("relations", "dropout", "carry_noise"):
        del written["config"]["arch"][key]
    for key in ("error_weighted", "error_interval"):
        del written["config"]["data"][key]
    del written["config"]["objective"]["differential_weight"]
    for key in ("relations", "colour_path", "draft_places", "draft_conditions"):
        del written["config"]["encoder"][key]
    info.write_text(json.dumps(written))
    train(load_config(fewshot, *common, "train_steps=2"))
    assert checkpoint.load_info(checkpoints / "step_2")["config"]["arch"]["relations"] == []
    with pytest.raises(UserError, match=r"arch.relations: \[\] then"):
        train(load_config(fewshot, *common, "train_steps=3", "arch.relations=[lines]"))
