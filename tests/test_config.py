"""The command line: typed, strict, and helpful when something is mistyped."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import BaseModel

import evaluate
import pretrain_etrm
from config import compose
from config.compose import CONFIG_DIR
from config.schema import PretrainConfig
from dataset import build_arc_dataset
from evaluation.session import EvaluateConfig
from models.encoders import ENCODERS
from models.trm import ARCHITECTURES
from predict import PredictConfig
from tests.support.reads import READ_BY_NAME, Program, program, unread_settings
from tests.support.runs import ROOT, TINY, run, untrained, without_digests
from tools.timeline import TimelineConfig
from training.step import MODES
from utils.errors import UserError


@pytest.mark.parametrize(
    "name", ["tâche (1).json", "a=b.json", "it's.json", "a,b.json", "{a}#.json", "[6].json"]
)
def test_a_path_may_have_any_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(name).write_text("{}")
    for path in (name, str(tmp_path / name), f"not/there/{name}"):
        assert compose.load(PredictConfig, "predict", [f"task={path}", "checkpoint=x"]).task == path
    with pytest.raises(UserError, match="\"key='value'\" for unusual characters"):
        compose.load(PredictConfig, "predict", ["task=(", "checkpoint=x"])


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["learning_rat=1"], "unknown key 'learning_rat'"),
        (["arch.hiden_size=64"], "did you mean 'arch.hidden_size'"),
        (["data.bukets=[6]"], "did you mean 'data.buckets'"),
        (["+arch.widht=3"], "unknown key 'arch.widht'"),
        (["encoder=memori"], "did you mean 'memory'"),
        (["arch=etmr"], "did you mean 'etrm'"),
        (["experiment=dmo"], "did you mean 'demo'"),
        (["lr=fast"], "lr=fast: input should be a valid number"),
        (["arch.pos_encodings=rope3d"], "did you mean 'rope2d'"),
        (["logging.wandb=onlin"], "did you mean 'online'"),
        (
            ["arch.hidden_size=100", "arch.num_heads=8"],
            "arch.hidden_size=100 is not divisible by arch.num_heads=8",
        ),
        (["arch.num_heads=256"], "needs hidden_size / num_heads divisible by 4"),
        (["arch.H_cycles=0"], "arch.H_cycles=0: input should be greater than 0"),
        (
            ["validation=0"],
            "validation=0: it may be a whole number above 0, a number above 0 and below 1 or null",
        ),
        (["data.translate=some"], "data.translate=some: it may be true, false or each"),
        (
            ["data.query_sampling={a: one}"],
            "data.query_sampling.a=one: input should be 'any', 'test' or 'all'",
        ),
        (["run_name=.."], "run_name=..: a name is made of letters, digits and _ . = , + -; its first"),
        (["data.buckets=[10,6]"], "ascending canvas sides"),
        (["data.min_demos=5", "data.max_demos=2"], "data.min_demos=5 is larger than data.max_demos=2"),
        (["global_batch_size=0"], "global_batch_size=0: input should be greater than 0"),
        (["encoder=null"], "encoder=null is no choice"),
        (["arch=trm", "arch.puzzle_emb_ndim=0"], "arch.puzzle_emb_ndim must be at least 1"),
        (
            ["arch=trm_hier6", "arch.L_cycles=4"],
            "arch.num_latents=6 needs arch.L_cycles of at least that, found 4",
        ),
        (["arch.grad_cycles=4"], "arch.grad_cycles=4 is larger than arch.H_cycles=3"),
        (
            ["arch=transformers_baseline", "arch.num_heads=12"],
            "arch.hidden_size=512 is not divisible by arch.num_heads=12",
        ),
        (["arch=hrm", "arch.num_latents=2"], "unknown key 'arch.num_latents'"),
        (["arch.halt_threshold=1.5"], "arch.halt_threshold=1.5: input should be less than 1"),
        (["arch.pos_encodings=rope"], "needs one canvas size"),
        (["arch.mlp_t=true"], "has no attention to rotate"),
        (
            ["arch.mlp_t=true", "arch.pos_encodings=none", "data.canvas=full"],
            "no attention that could read the memory of encoder=memory",
        ),
        (
            ["arch.pos_encodings=learned", "data.canvas=full", "encoder.placement=prefix"],
            "needs a state of fixed length",
        ),
        (
            ["arch.pos_encodings=rope", "data.canvas=full", "arch.hidden_size=48", "arch.num_heads=8"],
            "divisible by 4",
        ),
        (
            ["encoder.num_layers=0", "arch.pos_encodings=none"],
            "encoder.num_layers=0 leaves the places of cells to the core",
        ),
        (["arch.num_heads=1"], "needs arch.num_heads >= 2"),
        (
            ["arch.num_heads=1", "arch.pos_encodings=rope2d"],
            "encoder.positions=rope2d_values turns the values of half",
        ),
        (
            [
                "encoder=standard",
                "encoder.hidden_size=32",
                "encoder.num_heads=1",
                "encoder.positions=rope2d_values",
            ],
            "half of the encoder's heads, found 1",
        ),
        (["arch.num_heads=0"], "arch.num_heads=0: input should be greater than 0"),
        (["evaluation.num_views=0"], "evaluation.num_views=0"),
        (["evaluation.pass_ks=[]"], "evaluation.pass_ks"),
        (["lr=nan"], "lr=nan"),
        (["seed=-1"], "seed=-1"),
        (["data.max_train_groups=-1"], "data.max_train_groups=-1"),
        (["run_name=../../x"], "run_name=../../x"),
        (["ema_rate=1.5"], "ema_rate=1.5: input should be less than 1"),
        (["encoder=standard", "encoder.output_tokens=0"], "output_tokens=0: input should be greater than 0"),
        (["parts=ask"], "unknown key 'parts'"),
        (["no equals sign"], "overrides have the form key=value"),
    ],
)
def test_a_mistake_names_itself_and_the_nearest_valid_word(overrides, words):
    with pytest.raises(UserError, match=re.escape(words)):
        compose.load(PretrainConfig, "pretrain", overrides)


def test_a_needless_plus_is_accepted():
    assert compose.load(PretrainConfig, "pretrain", ["+run_name=x", "+arch.L_cycles=6"]).arch.L_cycles == 6
    assert (
        compose.load(
            PretrainConfig, "pretrain", ["+arch.num_latents=3", "arch=trm_hier6", "data.buckets=[10]"]
        ).arch.num_latents
        == 3
    )


def test_a_sweep_over_values_runs_every_one(fewshot, tmp_path):
    from tests.support.runs import arguments_for

    done = run(*arguments_for(fewshot, tmp_path, "train_steps=1", "run_name=s\\,${seed}"), "-m", "seed=0,1")
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("*/checkpoints/step_1"))) == 2


def test_a_required_value_is_asked_for():
    with pytest.raises(UserError, match="checkpoint has no default; give it as checkpoint=VALUE"):
        compose.load(EvaluateConfig, "evaluate", [])


@pytest.mark.parametrize(
    "experiment", sorted(file.stem for file in (CONFIG_DIR / "experiment").glob("*.yaml"))
)
def test_every_experiment_is_a_valid_configuration(experiment):
    assert compose.load(PretrainConfig, "pretrain", [f"experiment={experiment}"]).name


@pytest.mark.parametrize("encoder", sorted(file.stem for file in (CONFIG_DIR / "encoder").glob("*.yaml")))
def test_every_encoder_yaml_is_valid_and_named_like_its_file(encoder):
    assert compose.load(PretrainConfig, "pretrain", [f"encoder={encoder}"]).encoder.name == encoder


def test_every_configuration_key_is_read_somewhere():
    """A key that nothing reads is a setting that silently does nothing."""
    assert not unread_settings(), "never read, or read in a way that tests/support/reads.py does not see"


def test_no_kind_of_configuration_is_left_out_of_that():
    known = program().settings()
    kinds = {row[0].__name__ for table in (ENCODERS, ARCHITECTURES, MODES) for row in table.values()}
    kinds |= {schema.__name__ for schema in (PretrainConfig, EvaluateConfig, PredictConfig, TimelineConfig)}
    run_of_all = compose.load(PretrainConfig, "pretrain", [])
    kinds |= {type(value).__name__ for _, value in run_of_all if isinstance(value, BaseModel)}
    for file in (CONFIG_DIR / "protocol").glob("*.yaml"):
        asked = compose.load(EvaluateConfig, "evaluate", ["checkpoint=x", f"protocol={file.stem}"])
        kinds.add(type(asked.protocol).__name__)
    assert kinds <= known.keys() and {setting.split(".")[0] for setting in READ_BY_NAME} <= known.keys()


@pytest.mark.parametrize(
    "owner, field",
    [
        ("PooledEncoderConfig", "latent_width"),
        ("PooledEncoderConfig", "steps"),
        ("PerceiverEncoderConfig", "num_heads"),
        ("ManyLatentsConfig", "H_layers"),
        ("TransformerConfig", "H_cycles"),
        ("FixedStepsConfig", "split"),
        ("DataConfig", "lr"),
        ("LatentSearchConfig", "rank"),
        ("PredictConfig", "data_path"),
        ("EvaluateConfig", "path"),
    ],
)
def test_a_key_that_is_read_of_another_configuration_only_is_found(owner, field):
    """Such a field is made up here: its name occurs in the code, or nowhere, but never on its owner."""
    home = next(module for module in program().modules if f"class {owner}(" in module.text)
    body = home.text.index("\n    ", home.text.index(f"class {owner}("))
    changed = replace(home, text=f"{home.text[:body]}\n    {field}: int | None\n{home.text[body:]}")
    modules = [changed if module is home else module for module in program().modules]
    assert set(Program(modules).unread(READ_BY_NAME)) - set(unread_settings()) == {f"{owner}.{field}"}


def test_the_resolved_configuration_is_printed():
    done = run("pretrain_etrm.py", "--cfg", "job", "arch.hidden_size=64")
    assert done.returncode == 0, done.stderr
    assert "hidden_size: 64" in done.stdout and "name: memory" in done.stdout and "hydra" not in done.stdout


def assert_one_error(printed: str, words: str) -> None:
    (line,) = printed.strip().splitlines()
    assert line.startswith("error: ") and words in line


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([str(ROOT / "pretrain_etrm.py"), "data.path=nowhere"], "no dataset at nowhere"),
        ([str(ROOT / "evaluate.py"), "checkpoint=nowhere"], "checkpoint nowhere does not exist"),
        (
            ["-m", "dataset.build_arc_dataset", "--input-file", "none.json", "--output-dir", "out"],
            "no such file",
        ),
    ],
)
def test_every_program_ends_a_mistake_with_one_line_and_exit_code_2(arguments, words, tmp_path):
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert_one_error(done.stderr, words)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def error_of(monkeypatch, capsys):
    """What a program prints to stderr in this process while it ends with exit code 2."""

    def call(main, *arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["program", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        return capsys.readouterr().err

    return call


@pytest.mark.parametrize(
    "program, arguments, words",
    [
        (pretrain_etrm, ["arch.hidden=1"], "did you mean 'arch.hidden_size'"),
        (pretrain_etrm, ["device=cuda"], "PyTorch finds no usable GPU"),
        (evaluate, [], "checkpoint has no default"),
        (evaluate, [f"checkpoint={CONFIG_DIR}"], "is not a checkpoint directory of this framework"),
        (build_arc_dataset, ["--subsets", "trainin", "--output-dir", "out"], "did you mean 'training'"),
        (
            build_arc_dataset,
            ["--max-grid-size", "99", "--output-dir", "out"],
            "--max-grid-size must be 1..30",
        ),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(
    program, arguments, words, error_of, tmp_path, monkeypatch
):
    if "device=cuda" in arguments and torch.cuda.is_available():
        pytest.skip("a GPU is present, so device=cuda is no mistake")
    monkeypatch.chdir(tmp_path)
    assert_one_error(error_of(program.main, *arguments), words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "damage, words",
    [
        ("truncated", "ema.safetensors is damaged: its SHA-256 is not the one in info.json"),
        ("truncated, without digests", "ema.safetensors is damaged or no safetensors file"),
        ("foreign, without digests", "ema.safetensors is damaged or no safetensors file"),
        ("empty info", "info.json is not of checkpoint format"),
    ],
)
def test_a_damaged_or_foreign_checkpoint_is_one_line(damage, words, fewshot, error_of, tmp_path):
    path = untrained(fewshot, tmp_path / "checkpoints")
    if "without digests" in damage:
        without_digests(path)
    if damage.startswith("truncated"):
        weights = (path / "ema.safetensors").read_bytes()
        (path / "ema.safetensors").write_bytes(weights[: len(weights) // 2])
    elif damage.startswith("foreign"):
        (path / "ema.safetensors").write_bytes(b"something else")
    else:
        (path / "info.json").write_text("{}")
    assert_one_error(error_of(evaluate.main, f"checkpoint={path}", f"output_dir={tmp_path / 'e'}"), words)
    assert not (tmp_path / "e").exists()


def test_the_code_speaks_of_itself_alone():
    """No absolute path of a machine in anything that is shipped."""
    for path in [
        *ROOT.glob("*.py"),
        *ROOT.glob("*/*.py"),
        *ROOT.glob("*/*.sh"),
        *ROOT.glob("config/**/*.yaml"),
    ]:
        assert not re.search(r"(?<![\w.])/(home|root|work|Users)/", Path(path).read_text()), path


@pytest.mark.parametrize("typed", ["1_2", "2024_11_29", "1e5", "007", "0x1f", "true", "on", "3.0"])
def test_a_name_stays_as_it_was_typed(typed):
    """Hydra reads 1_2 as the number 12 and 1e5 as 100000.0."""
    asked = compose.load(PredictConfig, "predict", [f"task_id={typed}", "checkpoint=x", "task=t.json"])
    assert asked.task_id == typed
    if re.fullmatch(r"[\w.]+", typed):
        assert compose.load(PretrainConfig, "pretrain", [f"run_name={typed}"]).run_name == typed
    assert compose.load(PretrainConfig, "pretrain", ["run_name=null"]).run_name is None


def test_every_run_of_a_sweep_has_a_folder_of_its_own(fewshot, tmp_path):
    options = [*TINY, f"data.path={fewshot.path}", f"output_dir={tmp_path}", "train_steps=1"]
    done = run("pretrain_etrm.py", "-m", *options, "lr=1e-4,3e-4", "run_name=a")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-lr=0.0001", "a-lr=0.0003"]
    done = run("pretrain_etrm.py", "-m", *options, "seed=1", "run_name=1_2,b")
    assert done.returncode == 0 and {"1_2", "b"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize(
    "sweep, words",
    [
        (["foo=1,2"], "unknown key 'foo'"),
        (["lr=1e-4,3e-4", "arch=trm,trmm"], "arch=trmm: there is no such arch (did you mean 'trm'?)"),
        (["seed=1,2", "arch.hiden_size=32"], "did you mean 'arch.hidden_size'?"),
    ],
)
def test_a_mistake_in_a_sweep_is_one_line_of_ours(sweep, words):
    done = run("pretrain_etrm.py", "-m", *sweep)
    assert done.returncode == 2
    assert_one_error(done.stderr, words)


@pytest.mark.parametrize("value", ["0", "1.5", "-3", "soon"])
def test_a_value_that_no_member_of_a_union_takes_is_told_in_one_line(value):
    with pytest.raises(UserError) as caught:
        compose.load(PretrainConfig, "pretrain", [f"validation={value}"])
    words = "it may be a whole number above 0, a number above 0 and below 1 or null"
    assert str(caught.value) == f"validation={value}: {words}"


@pytest.mark.parametrize(
    ("line", "completed"),
    [
        ("evaluate.py proto", {"protocol=", "protocol."}),
        ("evaluate.py protocol=latent", {"protocol=latent_search"}),
        ("evaluate.py num_vi", {"num_views="}),
    ],
)
def test_the_shell_completes_settings(line, completed, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["evaluate.py", "-sc", "query=bash"])
    monkeypatch.setenv("COMP_LINE", f"python {line}")
    monkeypatch.setenv("COMP_POINT", str(len(f"python {line}")))
    evaluate.main()
    assert set(capsys.readouterr().out.split()) == completed


def test_the_shell_gets_what_it_installs(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["pretrain_etrm.py", "--shell-completion", "install=bash"])
    pretrain_etrm.main()
    assert "complete -o nospace" in capsys.readouterr().out
