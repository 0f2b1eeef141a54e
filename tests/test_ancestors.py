"""The ancestors' command lines: those of their READMEs and job lists, every key, and what is said of each."""

import json
import re
import shlex

import pytest

import evaluate
import pretrain_etrm
from config import ancestors, compose, conversions
from config.schema import PretrainConfig
from config.translation import configuration_name
from dataset import npy
from dataset.store import Store
from evaluation.session import EvaluateConfig
from tests.support.ancestors import CASES, DATA, HARMLESS, MISTAKES, ORIGINAL
from tests.support.grids import write_store
from tests.support.runs import ROOT, called, metrics_of, run, steps_of, untrained
from training.start import flatten
from utils.errors import UserError

# Lines of the READMEs and job lists of the first ETRM and of trm001, with our script in the place of theirs.
LINES = (ROOT / "tests" / "data" / "ancestors.txt").read_text().splitlines()[1:]


DOCUMENT = (ROOT / "docs" / "ancestors.md").read_text()


def loaded(*words: str) -> PretrainConfig:
    """The configuration of a command line, as `launch` reads it."""
    name, rest = configuration_name(list(words))
    return compose.load(PretrainConfig, name or "pretrain", rest)


def arguments_of(line: str) -> list[str]:
    """What follows the script."""
    return shlex.split(line.split("pretrain_etrm.py", 1)[1])


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """A working directory without datasets, but for data/t of eight tasks."""
    monkeypatch.chdir(tmp_path)
    write_store(tmp_path / "data" / "t")


@pytest.mark.parametrize("experiment, line", ORIGINAL.items(), ids=ORIGINAL)
def test_a_line_of_the_originals_readme_is_our_experiment_of_it(experiment, line, bare):
    theirs = loaded("--config-name", "cfg_pretrain", *shlex.split(line)).model_dump()
    ours = loaded(f"experiment={experiment}").model_dump()
    differing = {key for key in ours if ours[key] != theirs[key]}
    assert differing == {"run_name"}


@pytest.mark.parametrize("line", LINES, ids=range(len(LINES)))
def test_a_line_of_the_first_etrm_or_trm001_is_understood(line, bare):
    loaded(*arguments_of(line))


@pytest.mark.parametrize("name", ancestors.CONFIGS)
def test_a_configuration_of_theirs_is_one_of_ours(name, bare, capsys):
    config = loaded(f"--config-name={name}", "+project_name=p", "+run_name=r")
    assert (config.project_name, config.run_name) == ("p", "r")
    assert config.global_batch_size == int(ancestors.CONFIGS[name]["global_batch_size"])
    assert f"ancestor's configuration {name} -> " in capsys.readouterr().err
    assert f"| `{name}` | {config.global_batch_size} |" in DOCUMENT
    assert config.encoder is None or config.data.canvas == "full"


def test_the_updates_of_the_first_etrms_configurations(bare):
    """100000 epochs of the 560 training tasks of ARC-AGI-1 and ConceptARC."""
    original = loaded("--config-name", "cfg_pretrain_etrm_arc_agi_1")
    assert (original.train_steps, original.eval_interval) == (145833, 14583)
    assert (original.arch.name, original.encoder.name, original.mode.name) == ("etrm", "standard", "act")
    fixed = loaded("-cn", "cfg_pretrain_encoder_arc_agi_1", "arch.num_act_steps=8", "lr_warmup_steps=100")
    assert fixed.train_steps == 8 * 218750 and fixed.arch.halt_max_steps == fixed.mode.num_act_steps == 8
    assert fixed.lr_warmup_steps == 800  # sampled batches there
    assert loaded("-cn", "cfg_pretrain_etrmtrm_arc_agi_1").encoder.update == "read"


def test_our_own_key_wins_over_a_configuration_of_theirs(bare):
    config = loaded(
        "-cn", "cfg_pretrain_etrm_arc_agi_1", "train_steps=7", "data=arc1_small", "encoder=memory"
    )
    assert (config.train_steps, config.eval_interval, config.data.path) == (7, None, "data/arc1-small")
    assert config.encoder.name == "memory"
    config = loaded("-cn", "cfg_pretrain_etrm_arc_agi_1", "data.path=data/t", "lr=1", "epochs=640")
    assert (config.train_steps, config.data.path, config.lr) == (10, "data/t", 1)


@pytest.mark.parametrize("line, expected", CASES, ids=[line for line, _ in CASES])
def test_a_key_of_theirs_is_one_of_ours(line, expected, bare):
    values = flatten(loaded(*shlex.split(line)).model_dump(mode="json"))
    assert {key: values.get(key) for key in expected} == expected


def test_every_key_of_theirs_is_tried():
    tried = {word.split("=")[0].lstrip("+") for line, _ in CASES + MISTAKES for word in shlex.split(line)}
    assert {row.key for row in ancestors.TRAINING} - tried - HARMLESS.keys() == set()


def test_a_key_without_counterpart_may_ask_for_nothing(bare, capsys):
    assert loaded(*(f"{key}={value}" for key, value in HARMLESS.items())) == loaded()
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "ancestor's key arch.act_inference=False -> nothing (as it is here)"
    assert len(said) == len(HARMLESS)


@pytest.mark.parametrize("line, words", MISTAKES, ids=[line for line, _ in MISTAKES])
def test_what_is_not_here_or_no_value_is_an_error(line, words, bare):
    with pytest.raises(UserError, match=re.escape(words)):
        loaded(*shlex.split(line))


def test_a_folder_with_their_files_is_said_to_be_one(bare, tmp_path):
    npy.export(Store.load("data/t"), tmp_path / "theirs")
    with pytest.raises(UserError, match="python -m dataset.npy import theirs FOLDER"):
        loaded("data_paths=[theirs]")


@pytest.mark.parametrize("layout", ["puzzle", "fewshot"])
def test_the_counts_of_an_epoch_are_those_that_the_ancestor_writes(layout, tmp_path):
    store = write_store(tmp_path / "d", layout)
    npy.export(store, tmp_path / "npy")
    about = json.loads((tmp_path / "npy" / "train" / "dataset.json").read_text())
    tasks, mean = conversions.training_size(store)
    assert (tasks, mean) == (about["total_groups"], about["mean_puzzle_examples"])


def test_the_original_counts_every_pair_of_an_augmentation(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tasks, mean = conversions.training_size(write_store(tmp_path / "p", "puzzle"))
    assert tasks == 6 + 5 and mean > 2  # the evaluation tasks' demonstrations, too
    line = ["arch=trm", "data_paths=[p]", "global_batch_size=7", "epochs=20"]
    assert loaded(*line).train_steps == int(20 * tasks * mean / 7)
    fewer = conversions.training_size(Store.load("p"), 4, 2)
    assert fewer[0] == 6  # here both limits are on what is trained
    few = loaded(*line, "max_train_groups=4", "max_eval_groups=2")
    assert few.train_steps == int(20 * fewer[0] * fewer[1] / 7)


def test_each_key_is_said_in_one_line_by_the_first_process(bare, capsys, monkeypatch):
    line = [DATA, "epochs=640", "+max_demos=4", "lr_warmup_steps=3", "--augment", "arch=etrm"]
    loaded(*line)
    assert capsys.readouterr().err.splitlines() == [
        "ancestor's key data_paths=[data/t] -> data=arc1 data.path=data/t",
        "ancestor's key epochs=640 -> train_steps=60",
        "ancestor's key max_demos=4 -> data.max_demos=4",
        "ancestor's flag --augment -> data.augmentation=random",
    ]
    loaded("arch=trm", "data_paths=[x/arc-aug-1000]", "epochs=1000")
    assert (
        "(by the ancestor's arc-aug-1000: there is no dataset at x/arc-aug-1000 yet)"
        in capsys.readouterr().err
    )
    monkeypatch.setenv("RANK", "1")
    loaded(*line)
    assert not capsys.readouterr().err


def test_what_is_ours_is_left_alone(capsys):
    """Also in a sweep: keys that both have are no reason to look at the configuration."""
    line = ["arch=trm,hrm", "arch.puzzle_emb_len=2,4", "grad_clip_norm=1,null", "eval_interval=5", "-m"]
    name, words = ancestors.translated("pretrain", [*line, "data.buckets=[6]"], compose.compose)
    assert name == "pretrain" and sorted(words) == sorted([*line, "data.buckets=[6]"])
    assert not capsys.readouterr().err
    assert ancestors.translated("predict", ["epochs=3"], compose.compose) == ("predict", ["epochs=3"])


def test_a_sweep_over_a_key_of_theirs(bare):
    def swept(*words: str) -> list[str]:
        return ancestors.translated("pretrain", ["-m", *words], compose.compose)[1]

    assert "encoder=standard,lpn" in swept("arch.encoder_type=standard,lpn")
    assert "grad_clip_norm=1.0,null" in swept("grad_clip_norm=1.0,0")
    assert {"train_steps=60,120", "data.path=data/t"} <= set(swept(DATA, "epochs=640,1280", "lr=1,2"))
    with pytest.raises(UserError, match="recurrent_encoder_type cannot take several values in a sweep"):
        swept("arch.recurrent_encoder_type=trm_style,recurrent_standard")
    with pytest.raises(UserError, match="global_batch_size takes several values in this sweep"):
        swept(DATA, "epochs=640", "global_batch_size=8,16")


def test_an_evaluation_understands_their_keys(bare):
    def asked(*words: str) -> EvaluateConfig:
        return compose.load(EvaluateConfig, "evaluate", list(words))

    config = asked(
        "load_checkpoint=c",
        "data_paths=[a]",
        "data_paths_test=[b]",
        "checkpoint_path=o",
        "global_batch_size=3",
    )
    assert (config.checkpoint, config.data_path, config.output_dir, config.batch_size) == ("c", "b", "o", 3)
    config = asked("load_checkpoint=c", "data_paths=[a]", "data_paths_test=[]", "eval_save_outputs=[preds]")
    assert (config.data_path, config.save_predictions) == ("a", True)
    assert asked("checkpoint=c", "'evaluators=[{name: x, pass_Ks: [1]}]'".strip("'")).pass_ks == [1]


@pytest.mark.parametrize("section", ancestors.SECTIONS)
def test_the_document_has_the_table(section):
    block = re.search(f"<!-- config/ancestors.py: {section} -->\n(.*?)\n<!-- end -->", DOCUMENT, re.DOTALL)
    assert block and block[1] == ancestors.table(section), "python -m config.ancestors prints the tables"


TOY = [
    "arch.hidden_size=32",
    "arch.num_heads=2",
    "arch.L_layers=1",
    "arch.H_cycles=1",
    "arch.L_cycles=1",
    "arch.halt_max_steps=2",
    "arch.forward_dtype=float32",
    "global_batch_size=4",
    "max_eval_groups=1",
    "evaluation.num_views=1",
    "log_predictions_every=null",
    "logging.progress=false",
    "compile=false",
    "device=cpu",
]


@pytest.mark.parametrize(
    "words, steps",
    [
        ("--config-name cfg_pretrain_encoder_original_arc_agi_1 +project_name=p data_paths=[f] epochs=2", 3),
        ("--config-name cfg_pretrain_etrmtrm_arc_agi_1 data_paths=[f] epochs=2 eval_interval=1", 3),
        ("--config-name cfg_pretrain_arc_agi_1 data_paths=[p] epochs=1 evaluators=[] eval_interval=1", 7),
        (
            "--config-name cfg_pretrain arch=hrm arch.H_layers=1 data_paths=[p] epochs=1 freeze_weights=True",
            7,
        ),
        ("arch=trm001 data_paths=[f] data.buckets=[6] --deep-supervision --epochs 2 --augment", 3),
    ],
)
def test_a_line_of_theirs_trains(words, steps, puzzle, fewshot, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "f").symlink_to(fewshot.path)
    (tmp_path / "p").symlink_to(puzzle.path)
    toy = [word for word in TOY if not ("hrm" in words and "L_cycles" in word)]
    called(monkeypatch, pretrain_etrm.main, *shlex.split(words), "+run_name=r", "checkpoint_path=o", *toy)
    assert steps_of(tmp_path / "o" / "r")[-1] == f"step_{steps}"
    assert metrics_of(tmp_path / "o" / "r")
    assert "ancestor's key checkpoint_path=o -> output_dir=o" in capsys.readouterr().err


def test_the_fixed_steps_of_the_first_etrm_train(fewshot, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [
        "-cn",
        "cfg_pretrain_encoder_arc_agi_1",
        "arch.num_act_steps=2",
        f"data_paths=[{fewshot.path}]",
        "epochs=2",
    ]
    toy = [word for word in TOY if "halt_max_steps" not in word]
    called(monkeypatch, pretrain_etrm.main, *words, "+run_name=r", "checkpoint_path=o", *toy)
    assert steps_of(tmp_path / "o" / "r")[-1] == "step_6"


def test_an_evaluation_of_theirs_runs(fewshot, tmp_path, monkeypatch):
    path = untrained(fewshot, tmp_path / "checkpoints")
    words = [f"load_checkpoint={path}", f"data_paths=[{fewshot.path}]", f"checkpoint_path={tmp_path / 'e'}"]
    called(monkeypatch, evaluate.main, *words, "num_views=1", "controls=[]", "device=cpu")
    assert (tmp_path / "e" / "results.json").is_file()


def test_the_resolved_configuration_of_a_line_is_printed(tmp_path):
    done = run(str(ROOT / "pretrain_etrm.py"), *arguments_of(LINES[0]), "--cfg", "job", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "run_name: etrm_baseline" in done.stdout and "train_steps: 218750" in done.stdout
    assert "name: standard" in done.stdout and "halt_exploration_prob: 0.5" in done.stdout
