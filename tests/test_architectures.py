"""Every architecture, in every precision and with every kind of context: training, halting, loading, counting."""

import dataclasses
import functools
import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from config import compose
from config.compose import CONFIG_DIR
from config.schema import PretrainConfig
from dataset.batch import Batch, Cell
from dataset.canvas import IGNORE_LABEL_ID, PAD
from dataset.leaks import UNKNOWN_PAIRS
from experiments import published
from models import layers, summary
from models.act import Answer, act_step, initial_carry, solve
from models.context import PuzzleEmbedding
from models.core import DataSizes, RecursiveModel
from models.encoders import ENCODERS
from models.losses import act_loss
from models.pretrained import load_checkpoint, load_decoder, load_original, pairs_behind
from models.trm import ARCHITECTURES, build_model
from tests.conftest import ROOT, TINY, evaluate_here, load_config, write_store
from tests.test_models import SIDE, episodes
from training.ema import EMA
from training.optim import build_optimizers
from training.state import TrainState
from training.step import StepSettings, train_step
from utils import checkpoint
from utils.distributed import World
from utils.errors import UserError

GOLDEN = Path(__file__).parent / "golden"
CPU = torch.device("cpu")
SIZES = DataSizes(12, 9, SIDE**2)
SMALL = ["arch.hidden_size=32", "arch.num_heads=2", "arch.halt_max_steps=3", "arch.forward_dtype=float32"]
SMALL += ["data.buckets=[6]", "data.augmentation=none", "global_batch_size=4", "lr_warmup_steps=1"]
CYCLES = {
    "trm": ["arch.H_cycles=2", "arch.L_cycles=2"],
    "trm_singlez": ["arch.H_cycles=2", "arch.L_cycles=2"],
    "trm_hier6": ["arch.H_cycles=2", "arch.L_cycles=3", "arch.num_latents=3"],
    "hrm": ["arch.H_layers=1", "arch.L_layers=2"],
    "transformers_baseline": ["arch.H_layers=2"],
    "trm001": ["arch.H_cycles=2", "arch.L_cycles=2"],
}
CONTEXTS = {"puzzle": ["arch.puzzle_emb_len=2"], "memory": ["encoder=memory", "arch.pos_encodings=rope2d"]}
MLP = ["arch.mlp_t=true", "arch.pos_encodings=none"]
CASES = {
    **{(arch, context): [f"arch={arch}", *CYCLES[arch], *CONTEXTS[context]] for arch in CYCLES for context in CONTEXTS},
    ("etrm", "memory"): ["arch=etrm", *CYCLES["trm"]],
    ("mlp_t", "puzzle"): ["arch=trm", *CYCLES["trm"], *CONTEXTS["puzzle"], *MLP],
    ("mlp_t", "standard"): ["arch=etrm", *CYCLES["trm"], "encoder=standard", *MLP],
}
del CASES["trm001", "puzzle"]  # it has an encoder by default
every_case = pytest.mark.parametrize("case", CASES, ids="-".join)


@functools.lru_cache
def config_of(*overrides: str, **arch) -> PretrainConfig:
    """A small configuration; `arch` replaces values of `arch.*` after composing, which takes longer than the models do."""
    if arch:
        config = config_of(*overrides)
        return config.model_copy(update={"arch": config.arch.model_copy(update=arch)})
    return compose.load(PretrainConfig, "pretrain", [*SMALL, *overrides])


def model_of(config: PretrainConfig, seed: int = 0) -> RecursiveModel:
    torch.manual_seed(seed)
    model = build_model(config.arch, SIZES, config.encoder)
    torch.nn.init.normal_(model.q_head.weight, std=0.1)  # at its zero start the halting loss has no gradient for the state
    if isinstance(model.context, PuzzleEmbedding):
        torch.nn.init.normal_(model.context.weights, std=0.1)
    return model


def data_of(config: PretrainConfig, seed: int = 0) -> dict[str, Tensor]:
    data = episodes(seed=seed).data
    return data if config.encoder else {name: value for name, value in data.items() if not name.startswith("demo")}


def train_state(config: PretrainConfig) -> tuple[TrainState, StepSettings]:
    model = model_of(config)
    state = TrainState(model, build_optimizers(model, config, CPU)[0], EMA(model, 0.9))
    return state, StepSettings(config.mode, config.objective, config, config.seed, config.global_batch_size, 10, World())


def reached_by_gradients(model: RecursiveModel) -> set[str]:
    """The names of parameters that have had a finite gradient other than zero since this call; it fills as gradients come."""
    touched: set[str] = set()

    def note(name: str, gradient: Tensor) -> None:
        if gradient.isfinite().all() and gradient.any():
            touched.add(name)

    for name, parameter in model.named_parameters():
        parameter.register_hook(functools.partial(note, name))
    return touched


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@every_case
def test_every_architecture_trains_and_its_checkpoint_restores_it(case, dtype, tmp_path):
    config = config_of(*CASES[case], forward_dtype=dtype)
    state, settings = train_state(config)
    batches = [Batch(Cell(SIDE, 3), data_of(config, seed)) for seed in range(4)]
    touched = reached_by_gradients(state.model)
    before = {name: value.clone() for name, value in state.model.named_parameters()}

    def losses(some: list[Batch]) -> list[float]:
        results = [train_step(state, batch, settings) for batch in some]
        assert all(result.updated for result in results)
        return [result.metrics["lm_loss"].item() for result in results]

    assert np.isfinite(losses(batches[:3])).all()
    for name, parameter in state.model.named_parameters():
        assert name in touched and not torch.equal(parameter, before[name]), name
        assert parameter.dtype == torch.float32 and state.ema.shadow[name].dtype == torch.float32, name
    (carry,) = state.carries.values()
    assert {value.dtype for value in carry.states} == {config.arch.dtype}
    path = state.save(tmp_path, World(), {}, keep=1)
    expected = losses(batches[3:])
    state, settings = train_state(config)
    state.load(path, World(), CPU)
    assert losses(batches[3:]) == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("arch", CYCLES)
def test_every_architecture_trains_with_every_encoder(arch, dtype):
    small = {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "output_tokens": 3, "latent_dim": 4}
    for name in ENCODERS:
        encoder = config_of(*CASES["etrm", "memory"], f"encoder={name}").encoder
        shrunk = {key: value for key, value in small.items() if getattr(encoder, key, None) is not None}
        values = dict(config_of(*CASES[arch, "memory"], forward_dtype=dtype))
        config = PretrainConfig(**values | {"encoder": encoder.model_copy(update=shrunk)})  # each is composed once, every pair is checked
        state, settings = train_state(config)
        touched = reached_by_gradients(state.model)
        results = [train_step(state, Batch(Cell(SIDE, 3), data_of(config, seed)), settings) for seed in range(3)]
        assert all(result.updated and result.metrics["lm_loss"].isfinite() for result in results), name
        assert touched == dict(state.model.named_parameters()).keys(), name
        assert {p.dtype for p in state.model.parameters()} | {p.dtype for p in state.ema.shadow.values()} == {torch.float32}, name


@every_case
def test_q_learning_trains_q_continue_in_every_architecture(case):
    config = config_of(*CASES[case], no_ACT_continue=False)
    model = model_of(config).train()
    data = data_of(config)
    output = act_step(model, initial_carry(model, data), data)
    assert torch.equal(output.carry.halted, output.q_halt_logits > output.q_continue_logits)
    assert ((output.target_q_continue > 0) & (output.target_q_continue < 1)).all()
    loss, metrics = act_loss(output, config.objective)
    loss.backward()
    assert metrics["q_continue_loss"] > 0 and model.q_head.weight.grad[1].any()


SMALLEST = {
    "etrm": ["arch.H_cycles=2", "arch.L_cycles=1", "arch.L_layers=1", "encoder.num_layers=1"],
    "trm_singlez": ["arch.H_cycles=2", "arch.L_cycles=1", "arch.L_layers=1"],
    "trm_hier6": ["arch.H_cycles=1", "arch.L_cycles=2", "arch.L_layers=1", "arch.num_latents=2"],
    "hrm": ["arch.H_cycles=1", "arch.L_cycles=2", "arch.H_layers=1", "arch.L_layers=1"],
    "transformers_baseline": ["arch.H_layers=1"],
}


@pytest.mark.parametrize("arch", SMALLEST)
def test_every_architecture_is_one_graph_for_the_compiler_with_the_same_gradients(arch):
    config = config_of(f"arch={arch}", *SMALLEST[arch])
    model = model_of(config).train()
    data = data_of(config)
    states = act_step(model, initial_carry(model, data), data).carry.states
    rows = None if config.encoder else model.context(data)  # a look-up outside the graph: its rows are leaves of their own

    def step(states, data):
        return model(states, data["inputs"], rows or model.context(data)).logits

    def run(step) -> list[Tensor]:
        model.zero_grad()
        logits = step(states, data)
        logits.square().mean().backward()
        return [logits.detach(), *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]

    plain, compiled = run(step), run(torch.compile(step, fullgraph=True, backend="eager", dynamic=False))
    assert len(plain) == len(compiled) and all(torch.allclose(a, b, atol=1e-5) for a, b in zip(plain, compiled, strict=True))
    torch.compiler.reset()


@pytest.mark.parametrize("case, with_gradient, calls", [
    (("trm", "puzzle"), 3, 6), (("trm001", "memory"), 6, 6), (("hrm", "puzzle"), 2, 6), (("transformers_baseline", "puzzle"), 1, 1),
    (("trm_hier6", "puzzle"), 4, 8), (("trm_singlez", "puzzle"), 3, 6),
])  # fmt: skip
def test_every_update_of_the_supervised_window_receives_a_gradient_and_no_other(case, with_gradient, calls):
    config = config_of(*CASES[case], no_ACT_continue=True)
    model = model_of(config).train()
    made, reached = [], []

    def watch(module, inputs, output) -> None:
        made.append(output.requires_grad)
        if output.requires_grad:
            output.register_hook(lambda gradient: reached.append(bool(gradient.any())))

    for name in model.networks:
        model.get_submodule(name).register_forward_hook(watch)
    data = data_of(config)
    act_loss(act_step(model, initial_carry(model, data), data), config.objective)[0].backward()
    assert made == [False] * (calls - with_gradient) + [True] * with_gradient
    assert reached == [True] * with_gradient


@every_case
def test_the_initial_carry_is_never_read(case):
    config = config_of(*CASES[case])
    model = model_of(config).train()
    data = data_of(config)
    clean = initial_carry(model, data)
    assert not any(state.any() for state in clean.states)
    dirty = dataclasses.replace(clean, states=tuple(torch.full_like(state, torch.nan) for state in clean.states))
    outputs = [act_step(model, carry, data) for carry in (clean, dirty)]
    assert torch.equal(outputs[0].logits, outputs[1].logits)


@pytest.mark.parametrize("loss_type", ["softmax", "stablemax"])
@pytest.mark.parametrize("arch", ["trm", "hrm", "transformers_baseline"])
def test_every_token_loss_works_with_every_head(arch, loss_type):
    config = config_of(*CASES[arch, "puzzle"], f"objective={loss_type}")
    model = model_of(config).train()
    data = data_of(config)
    assert act_loss(act_step(model, initial_carry(model, data), data), config.objective)[0].isfinite()


def test_act_can_be_switched_off():
    config = config_of(*CASES["trm", "puzzle"], act_enabled=False)
    model = model_of(config).train()
    torch.nn.init.constant_(model.q_head.bias, 5.0)
    data = data_of(config)
    carry = initial_carry(model, data)
    for step in range(1, 4):
        carry = act_step(model, carry, data).carry
        assert carry.halted.tolist() == [step == 3] * 4
    config = config_of(*CASES["trm", "puzzle"], act_enabled=False, no_ACT_continue=False, halt_threshold=0.9)
    model.config = config.arch
    output = act_step(model.train(), initial_carry(model, data), data)
    assert output.target_q_continue is None  # q_continue learns nothing, and evaluation does not ask it
    assert solve(model.eval(), data).steps.tolist() == [1] * 4


def test_every_latent_is_updated_once_per_cycle():
    model = model_of(config_of(*CASES["trm_hier6", "puzzle"]))
    data = data_of(config_of(*CASES["trm_hier6", "puzzle"]))
    carry = initial_carry(model, data)
    after = act_step(model, carry, data).carry.states
    assert len(after) == 4
    for new, initial in zip(after, model.initial_states(), strict=True):
        assert not torch.allclose(new, initial.expand_as(new), atol=1e-2)


def test_the_puzzle_table_takes_any_batch_size():
    config = config_of(*CASES["trm", "puzzle"])
    model = model_of(config).train()
    for batch in (1, 3, 7):
        data = {name: value for name, value in episodes(batch).data.items() if not name.startswith("demo")}
        assert act_step(model, initial_carry(model, data), data).logits.shape[0] == batch


def test_a_row_of_one_token_feeds_the_q_head_with_that_token():
    model = model_of(config_of(*CASES["trm", "puzzle"], puzzle_emb_len=0))
    assert model.context.prefix_length(0, SIDE**2) == 1


def test_mean_pooling_reads_the_cells_of_the_input_and_no_padding():
    config = config_of(*CASES["trm", "puzzle"], halt_pooling="mean")
    model = model_of(config)
    inputs = data_of(config)["inputs"]
    answer = torch.randn(4, 2 + SIDE**2, 32)
    changed = answer.clone()
    changed[:, 2:][inputs == PAD] = 1e3
    changed[:, :2] = 1e3
    assert torch.allclose(model._summary(answer, inputs), model._summary(changed, inputs))
    expected = answer[:, 2:][inputs != PAD].view(4, 16, 32).mean(1)
    assert torch.allclose(model._summary(answer, inputs), expected, atol=1e-6)


def all_steps(model: RecursiveModel, data: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Logits and halting logits of every ACT step, without any early halt."""
    carry, steps = initial_carry(model, data), []
    with torch.no_grad():
        for _ in range(model.config.halt_max_steps):
            output = act_step(model, carry, data)
            carry = dataclasses.replace(output.carry, halted=torch.zeros_like(output.carry.halted))
            steps.append((output.logits, output.q_halt_logits))
    return steps


def test_without_a_threshold_every_sample_is_evaluated_for_all_steps():
    config = config_of(*CASES["trm", "puzzle"])
    model = model_of(config).eval()
    data = data_of(config)
    answer = solve(model, data)
    assert torch.equal(answer.logits, all_steps(model, data)[-1][0]) and answer.steps.tolist() == [3] * 4


@pytest.mark.parametrize("q_learning", [False, True])
def test_a_confident_sample_keeps_the_answer_at_which_it_halted_whatever_its_batch(q_learning):
    config = config_of(*CASES["trm", "memory"], halt_max_steps=5, no_ACT_continue=not q_learning)
    model = model_of(config).eval()
    torch.nn.init.normal_(model.q_head.weight, std=0.5)
    torch.nn.init.zeros_(model.q_head.bias)
    data = data_of(config)
    steps = all_steps(model, data)
    confidence = torch.stack([q_halt for _, q_halt in steps]).sigmoid()
    threshold = 0.5 if q_learning else confidence[0].sort().values[1:3].mean().item()  # between two rows: no rounding decides
    model.config = config.arch.model_copy(update={"halt_threshold": threshold})
    answer = solve(model, data)
    assert len(set(answer.steps.tolist())) > 1
    for row in range(4):
        alone = solve(model, {name: value[row : row + 1] for name, value in data.items()})
        assert alone.steps.item() == answer.steps[row]
        assert torch.allclose(alone.logits[0], answer.logits[row], atol=1e-5)
        assert torch.allclose(answer.logits[row], steps[answer.steps[row] - 1][0][row], atol=1e-5)
        if not q_learning:
            early = (confidence[:, row] >= threshold).nonzero()
            assert answer.steps[row] == (early[0] + 1 if len(early) else 5)


def test_the_loop_ends_when_every_sample_has_halted():
    config = config_of(*CASES["trm", "puzzle"], halt_threshold=0.5, halt_max_steps=16)
    model = model_of(config).eval()
    torch.nn.init.constant_(model.q_head.bias, 5.0)
    calls = []
    model.register_forward_hook(lambda *arguments: calls.append(1))
    answer: Answer = solve(model, data_of(config))
    assert answer.steps.tolist() == [1] * 4 and len(calls) == 1


def test_every_architecture_has_a_yaml_of_its_name_and_every_yaml_is_valid():
    files = {file.stem for file in (CONFIG_DIR / "arch").glob("*.yaml")}
    assert set(ARCHITECTURES) <= files
    for name in files:
        config = compose.load(PretrainConfig, "pretrain", [f"arch={name}", "data.canvas=full", "data.augmentation=none"])
        assert config.arch.name == name or name not in ARCHITECTURES


def test_every_key_of_every_architecture_is_read_somewhere():
    source = "\n".join(path.read_text() for folder in ("models", "training") for path in (ROOT / folder).glob("*.py"))
    for config, _ in ARCHITECTURES.values():
        for key in config.model_fields:
            assert re.search(rf"\.{key}\b|: \"{key}\"", source), f"{config.__name__}.{key} is never read"


# --- a decoder from a file ---------------------------------------------------------------------------------------------

DECODER = ["arch.hidden_size=64", "arch.num_heads=4", "arch.H_cycles=3", "arch.L_cycles=4", "arch.pos_encodings=rope", "data.buckets=[10]"]


def decoder_config(path: Path, *overrides: str) -> PretrainConfig:
    return config_of(*DECODER, f"load_pretrained_decoder={path}", *overrides)


def decoder_model(config: PretrainConfig) -> RecursiveModel:
    torch.manual_seed(1)
    return build_model(config.arch, DataSizes(12, 9, 100), config.encoder)


@pytest.fixture
def original(tmp_path) -> Path:
    """An original TRM's file with its configuration and its puzzles' names beside it."""
    shutil.copy(GOLDEN / "trm_attention.checkpoint.pt", tmp_path / "step_1")
    arch = {"name": "recursive_reasoning.trm@TinyRecursiveReasoningModel_ACTV1", "H_cycles": 3, "L_cycles": 4, "pos_encodings": "rope"}
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
    theirs = {name.removeprefix("_orig_mod.").removeprefix("model.inner."): value for name, value in state.items()}
    own = model.state_dict()
    for name in ("L_level.layers.1.mlp.down_proj.weight", "H_init", "L_init", "q_head.bias", "lm_head.weight"):
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
def test_other_arithmetic_than_the_weights_were_trained_with_is_refused_and_changes_nothing(override, words, original):
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
    "name", ["recursive_reasoning.hrm@HierarchicalReasoningModel_ACTV1", "hrm.hrm_act_v1@HierarchicalReasoningModel_ACTV1"]
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
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]
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
    state["_orig_mod.model.inner.puzzle_emb.weights"] = torch.randn(len(names), 64, generator=torch.Generator().manual_seed(0))
    torch.save(state, original)
    (tmp_path / "identifiers.json").write_text(json.dumps(names))
    options = [*DECODER[:-1], "arch.puzzle_emb_len=16", f"load_pretrained_decoder={original}", f"output_dir={tmp_path}", "run_name=run"]
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
        solve(model, {"inputs": inputs, "puzzle_identifiers": its_rows}).logits for model, its_rows in ((ours, rows), (theirs, their_rows))
    ]
    assert torch.equal(*answers) and not torch.equal(rows, their_rows)
    train(load_config(puzzle, *options, "train_steps=1"))  # the same run goes on from there
    assert checkpoint.latest(tmp_path / "run/checkpoints").name == "step_1"


@pytest.mark.parametrize("name", published.CHECKPOINTS)
def test_the_command_that_is_printed_for_a_published_checkpoint_fits_it(name, original):
    options = shlex.split(published.start_from(original, published.CHECKPOINTS[name].data))[2:]
    config = compose.load(PretrainConfig, "pretrain", [*options, "arch.hidden_size=64", "arch.num_heads=4"])
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


def test_a_run_starts_from_another_runs_averaged_decoder_and_reports_every_weight(fewshot, puzzle, tmp_path, capfd):
    from pretrain_etrm import train

    common = ["train_steps=1", f"output_dir={tmp_path}", "arch.pos_encodings=rope", "lr=0.1", "logging.wandb=disabled"]
    train(load_config(puzzle, *common, "run_name=first"))
    source = tmp_path / "first" / "checkpoints" / "step_1"
    start = [*common, f"load_pretrained_decoder={tmp_path / 'first'}", "lr=0", "weight_decay=0"]
    train(load_config(fewshot, *start, "run_name=second"))
    from safetensors.torch import load_file

    averaged, started = load_file(source / "ema.safetensors"), load_file(tmp_path / "second/checkpoints/step_1/ema.safetensors")
    raw = checkpoint.load_weights(source, "raw")
    name = "L_level.layers.0.self_attn.o_proj.weight"
    assert torch.allclose(started[name], averaged[name], atol=1e-6) and not torch.allclose(started[name], raw[name], atol=1e-6)
    report = OmegaConf.load(tmp_path / "second" / "pretrained_decoder.json")
    assert report.weights == "ema" and name in report.loaded and "context.weights" in report.skipped
    assert all(missing.startswith("context.") for missing in report.missing)
    assert "ema weights" in capfd.readouterr().err
    train(load_config(puzzle, *start, "run_name=third"))
    third = checkpoint.load_weights(tmp_path / "third/checkpoints/step_1", "raw")
    assert third[name].shape == raw[name].shape and torch.allclose(third["context.weights"][2:], averaged["context.weights"][2:], atol=2e-2)


def test_a_run_goes_on_with_a_whole_model_on_other_data(fewshot, tmp_path, capfd):
    from safetensors.torch import load_file

    from pretrain_etrm import train

    other = write_store(tmp_path / "other", seed=1)
    common = ["train_steps=1", f"output_dir={tmp_path}", "lr=0.1", "logging.wandb=disabled"]
    train(load_config(fewshot, *common, "run_name=first"))
    start = [*common, f"load_pretrained_decoder={tmp_path / 'first'}", "pretrained_encoder=load", "lr=0", "weight_decay=0"]
    train(load_config(other, *start, "run_name=second"))
    averaged, started = (load_file(tmp_path / name / "checkpoints/step_1/ema.safetensors") for name in ("first", "second"))
    assert averaged.keys() == started.keys() and any(name.startswith("context.") for name in started)
    assert all(torch.allclose(started[name], value, atol=1e-6) for name, value in averaged.items())
    report = OmegaConf.load(tmp_path / "second" / "pretrained_decoder.json")
    assert report.missing == [] and report.skipped == {}
    first, second = (checkpoint.load_trained_pairs(tmp_path / name / "checkpoints/step_1") for name in ("first", "second"))
    assert set(first) < set(second), "what the first weights were trained on counts as seen"
    train(load_config(other, *start, "run_name=second", "train_steps=2"))
    assert set(checkpoint.load_trained_pairs(tmp_path / "second" / "checkpoints" / "step_2")) == set(second)
    assert pairs_behind(Path("original.pt")) == UNKNOWN_PAIRS
    with pytest.raises(UserError, match="has no checkpoint with a score"):
        train(load_config(other, *start, f"load_pretrained_decoder={tmp_path / 'first' / 'best'}", "run_name=third"))
    with pytest.raises(UserError, match="encoder.num_layers=2 there, 1 here"):
        train(load_config(other, *start, "encoder.num_layers=1", "run_name=third"))
    with pytest.raises(UserError, match="arch.halt_pooling=first there, mean here"):
        train(load_config(other, *start, "arch.halt_pooling=mean", "run_name=third"))
    with pytest.raises(UserError, match="encoder.name=memory there, standard here"):
        train(load_config(other, *start, "encoder=standard", "run_name=third"))


# --- counting ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["trm", "hrm", "transformers_baseline"])
def test_flops_are_those_of_the_formula(arch):
    config = config_of(*CASES[arch, "puzzle"], no_ACT_continue=True)
    model = summary.on_meta(config, SIZES)
    counted = summary.cost(model, config, Cell(SIDE, 0))
    hidden, state, width = 32, 2 + SIDE**2, 256
    block = 2 * state * (4 * hidden**2 + 3 * hidden * width) + 4 * state**2 * hidden
    layers = {"trm": 12, "hrm": 4 * 2 + 2 * 1, "transformers_baseline": 2}[arch]
    heads = 2 * hidden * (SIDE**2 * 12 + 2)
    assert counted.act_step == layers * block + heads and counted.context == 0
    assert counted.state_tokens == state


@pytest.mark.parametrize("context", CONTEXTS)
def test_activations_are_what_a_real_training_step_keeps(context, monkeypatch):
    monkeypatch.setattr(layers, "PACKED_LENGTH", 10**6)  # on CPUs a step keeps less than the estimate for every device
    config = config_of(*CASES["trm", context])
    model, data = model_of(config).train(), data_of(config)
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        act_loss(act_step(model, initial_carry(model, data), data), config.objective)
    for owned in (*model.state_dict().values(), *data.values()):
        kept.pop(owned.untyped_storage().data_ptr(), None)
    real = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    estimate = summary.activation_bytes(summary.on_meta(config, SIZES), config, Cell(SIDE, 3), 4)
    assert abs(estimate - real) < 0.02 * real


def test_the_summary_splits_parameters_and_weighs_the_cells_of_a_dataset(fewshot):
    config = load_config(fewshot, "data.min_demos=2", "data.max_demos=3")
    text = summary.summarise(config)
    model = build_model(config.arch, DataSizes(12, 1, None), config.encoder)
    trunk = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("context."))
    assert f"{trunk:>16,}" in text and " mean " in text and str(fewshot.path) in text
    sizes, shares, source = summary.training_cells(config_of("data.path=nowhere"))
    assert list(shares) == [Cell(SIDE, 10)] and "no dataset at nowhere" in source


def test_labels_that_are_all_ignored_train_nothing():
    config = config_of(*CASES["hrm", "puzzle"])
    model, data = model_of(config).train(), data_of(config)
    data["labels"] = torch.full_like(data["labels"], IGNORE_LABEL_ID)
    loss, metrics = act_loss(act_step(model, initial_carry(model, data), data), config.objective)
    assert loss == 0 and metrics["rows"] == 0


@pytest.mark.parametrize("encoder", ["standard", "perceiver"])
def test_costs_are_counted_where_learned_queries_read(encoder):
    config = compose.load(PretrainConfig, "pretrain", [f"encoder={encoder}", *TINY, "arch.forward_dtype=float32"])
    counted = summary.cost(summary.on_meta(config, SIZES), config, Cell(SIDE, 3))
    assert 0 < counted.context < counted.train_step and counted.act_step < counted.train_step
