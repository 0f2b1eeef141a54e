"""Models on the hub: pushed, fetched by name and revision, checked, and asked; with a hub in a folder."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import evaluate
import predict
from evaluation.solver import Solver
from evaluation.trained_model import TrainedModel
from models.pretrained import load_decoder
from tests.support.hub import FolderHub
from tests.support.runs import called, evaluate_here, load_config, run, train_here
from tools import checkpoint as tool
from tools import publish, published
from tools.model_card import model_card
from utils import checkpoint, hub
from utils.errors import UserError
from utils.files import read_json, sha256_of, write_json

pytest.importorskip("huggingface_hub")
NAME = "someone/tiny"


@pytest.fixture(scope="module")
def trained(fewshot, tmp_path_factory):
    folder = train_here(fewshot, tmp_path_factory.mktemp("hub"), "train_steps=3", "lr=1e-2", "seed=4")
    evaluate_here(f"checkpoint={folder}", "num_views=2", "controls=[copy_input]", "report=false")
    return folder


@pytest.fixture
def folder_hub(tmp_path, monkeypatch) -> FolderHub:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return FolderHub(tmp_path / "hub").install(monkeypatch)


def loaded(path: str, weights: str = "ema") -> TrainedModel:
    return TrainedModel.load(path, weights, torch.device("cpu"))


def pushed(run_folder: Path) -> str:
    return publish.push_to_hub(run_folder, NAME)


def test_a_pushed_model_is_loaded_by_name_and_answers_bitwise_the_same(trained, fewshot, folder_hub, capsys):
    called_words = ["publish", str(trained), f"hub:{NAME}", "--private"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", called_words)
        publish.main()
    where = capsys.readouterr().out.split(";")[0]
    commit = where.split("@")[1]
    assert where == f"hub:{NAME}@{commit}" and folder_hub.created == {NAME: True}
    solvers = [
        Solver.from_pretrained(trained, device="cpu"),
        Solver.from_pretrained(NAME, device="cpu", revision=commit),
        Solver.from_pretrained(where, device="cpu"),
    ]
    first, *others = solvers
    for other in others:
        for name, value in first.model.state_dict().items():
            assert torch.equal(other.model.state_dict()[name], value), name
        for number in (6, 7):
            task = fewshot.task(number)
            assert other.solve(task, num_views=3) == first.solve(task, num_views=3)
            steps = [solver.refine(task, 0, view=2, num_views=3) for solver in (first, other)]
            assert json.dumps(steps[0], default=str) == json.dumps(steps[1], default=str)
    assert folder_hub.downloads == 1  # the second time the cache serves


def test_evaluate_and_predict_take_a_name_of_the_hub(trained, fewshot, folder_hub, monkeypatch, capsys):
    commit = pushed(trained)
    where = f"hub:{NAME}@{commit}"
    write_json(Path("task.json"), fewshot.task(6).to_json())
    shown = []
    for path in (where, trained):
        called(monkeypatch, predict.main, f"checkpoint={path}", "task=task.json", "format=json", "device=cpu")
        shown.append(json.loads(capsys.readouterr().out))
    assert shown[0]["queries"] == shown[1]["queries"] and shown[0]["submission"] == shown[1]["submission"]
    # An absolute path of its dataset has stayed where it was.
    words = [
        "num_views=2",
        "controls=[copy_input]",
        "report=false",
        "device=cpu",
        f"data_path={fewshot.path}",
    ]
    called(monkeypatch, evaluate.main, f"checkpoint={where}", "device=cpu", *words)
    (results,) = Path("runs/hub").glob(f"someone--tiny-{commit}/evaluations/*/results.json")
    (before,) = (trained / "evaluations").glob("*/results.json")
    found, expected = read_json(results), read_json(before)
    assert found["scores"] == expected["scores"]
    assert found["checkpoint"]["sha256"] == expected["checkpoint"]["sha256"]
    called(monkeypatch, tool.main, "inspect", where)
    assert "damage: none" in capsys.readouterr().out


def test_a_new_run_starts_from_a_name_of_the_hub(trained, fewshot, folder_hub):
    from dataset.batch import DataSizes
    from models.trm import build_model

    where = f"hub:{NAME}@{pushed(trained)}"
    config = load_config(fewshot, f"load_pretrained_decoder={where}", "pretrained_encoder=load")
    model = build_model(config.arch, DataSizes.of(fewshot, config.data), config.encoder)
    assert not load_decoder(model, config, []).missing
    expected = checkpoint.load_weights(checkpoint.resolve(trained), "ema")
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_what_is_shared_is_the_averaged_weights_under_the_names_of_the_hub(trained, folder_hub):
    commit = pushed(trained)
    folder = folder_hub.folder(NAME) / "snapshots" / commit
    names = {"README.md", "config.json", "model.safetensors", "scores.json", "trained_pairs.safetensors"}
    assert {path.name for path in folder.iterdir()} == names
    source = checkpoint.resolve(trained)
    expected, found = checkpoint.load_weights(source, "ema"), load_file(folder / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    about = read_json(folder / "config.json")
    assert about["sha256"]["model.safetensors"] == sha256_of(source / "ema.safetensors")
    assert about["arch"]["name"] == "etrm" and about["encoder"]["name"] == "memory"
    there = loaded(f"hub:{NAME}@{commit}")
    assert (there.trained_pairs == checkpoint.load_trained_pairs(source)).all() and there.step == 3
    with pytest.raises(UserError, match="has no 'raw' weights; it has ema"):
        loaded(f"hub:{NAME}@{commit}", "raw")
    assert '"/' not in (folder / "config.json").read_text() + (folder / "scores.json").read_text()


def test_the_card_says_what_the_checkpoint_and_its_evaluations_hold(trained, fewshot, folder_hub):
    write_json(
        trained / "environment.json", [{"command": f"pretrain_etrm.py data.path={fewshot.path} lr=1e-2"}]
    )
    text = (folder_hub.folder(NAME) / "snapshots" / pushed(trained) / "README.md").read_text()
    head = yaml.safe_load(text.split("---")[1])
    assert head["license"] == "mit" and head["library_name"] == "etrm"
    (results,) = (trained / "evaluations").glob("*/results.json")
    found = read_json(results)
    own = {score["metric"]: score for score in found["scores"] if score["control"] == "none"}
    (result,) = head["model-index"][0]["results"]
    assert {metric["type"] for metric in result["metrics"]} == own.keys()
    score = own["ARC/pass@1"]
    interval = f"[{100 * score['ci_low']:.1f}, {100 * score['ci_high']:.1f}]"
    assert f"| model | ARC/pass@1 | {100 * score['value']:.1f} % | {interval} | {score['n']} |" in text
    assert "| copy_input | ARC/pass@1 |" in text and f"protocol {found['protocol']}" in text
    info = checkpoint.load_info(checkpoint.resolve(trained))
    for words in (info["data"]["hash"], f"commit {info['git_commit']}", "Licence: mit", "| seed | 4 |"):
        assert words in text
    assert f"| `python pretrain_etrm.py data.path={fewshot.path.name} lr=1e-2` |" in text
    assert str(fewshot.path.parent) not in text


def test_a_pinned_model_needs_neither_network_nor_client_again(trained, folder_hub, monkeypatch):
    commit = pushed(trained)
    first = checkpoint.resolve(f"hub:{NAME}@{commit}")
    folder_hub.reachable = False
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert checkpoint.resolve(f"hub:{NAME}@{commit}") == first and checkpoint.damage(first) == ""
    with pytest.raises(UserError, match=r"needs huggingface_hub, .*pip install -e '.\[hub\]'"):
        checkpoint.resolve(f"hub:{NAME}@main")


def test_without_a_network_the_clients_own_cache_serves(trained, folder_hub, tmp_path):
    commit = pushed(trained)
    shutil.copytree(folder_hub.root, tmp_path / "home" / "hub")
    offline = {
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "1",
        "XDG_CACHE_HOME": str(tmp_path / "c"),
    }
    done = run("-m", "tools.published", f"hub:{NAME}", env=offline)
    assert done.returncode == 0, done.stderr
    assert f"hub:{NAME} is the commit {commit}; hub:{NAME}@{commit} stays the same" in done.stderr
    assert sha256_of(checkpoint.resolve(trained) / "ema.safetensors") in done.stdout
    missing = run("-m", "tools.published", "hub:someone/other@v1", env=offline)
    assert missing.returncode == 2 and missing.stderr.startswith("error: cannot fetch hub:someone/other@v1")
    assert missing.stderr.count("\n") == 1


def test_a_revision_is_what_it_was_and_a_branch_is_told_by_its_commit(
    trained, folder_hub, fewshot, tmp_path, capsys
):
    first = pushed(trained)
    other = train_here(fewshot, tmp_path / "other", "train_steps=1", "seed=9")
    evaluate_here(f"checkpoint={other}", "num_views=1", "controls=[]", "report=false")
    second = publish.push_to_hub(other, NAME, branch="next")
    assert first != second
    found = {name: loaded(f"hub:{NAME}{name}").step for name in ("", "@next", f"@{first}")}
    assert found == {"": 3, "@next": 1, f"@{first}": 3}
    said = capsys.readouterr().err
    assert f"hub:{NAME}@next is the commit {second}" in said and f"@{first} is" not in said


def test_other_weights_than_the_published_ones_are_refused(trained, folder_hub, tmp_path):
    publish.save_pretrained(trained, tmp_path / "shared", NAME)
    digest = sha256_of(tmp_path / "shared" / "model.safetensors")
    where = f"hub:{tmp_path / 'shared'}"
    assert Solver.from_pretrained(where, device="cpu", sha256=digest).trained.step == 3
    with pytest.raises(UserError, match=f"have SHA-256 {digest}, not 00"):
        Solver.from_pretrained(where, device="cpu", sha256="00")
    content = bytearray((tmp_path / "shared" / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "shared" / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="model.safetensors is missing or not the published one"):
        checkpoint.resolve(where)


def test_a_folder_in_the_layout_of_the_hub_is_asked_as_one(
    trained, folder_hub, tmp_path, monkeypatch, capsys
):
    called(monkeypatch, publish.main, trained, tmp_path / "shared", "--layout", "hub", "--name", NAME)
    assert f"checkpoint=hub:{tmp_path / 'shared'}" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert loaded(f"hub:{tmp_path / 'shared'}").step == 3
    with pytest.raises(UserError, match=f"is a model in the layout of the hub; ask for it as hub:{tmp_path}"):
        checkpoint.resolve(tmp_path / "shared")
    with pytest.raises(UserError, match="is not of a model that this framework has published"):
        write_json(tmp_path / "shared" / "config.json", {"model_type": "bert"})
        checkpoint.resolve(f"hub:{tmp_path / 'shared'}")


def test_a_folder_of_the_clients_cache_is_a_folder_like_any_other(trained, folder_hub, tmp_path):
    for name in ("snapshots", "elsewhere"):
        publish.save_pretrained(trained, tmp_path / name / "tiny", NAME)
    paths = {checkpoint.resolve(f"hub:{tmp_path / name / 'tiny'}") for name in ("snapshots", "elsewhere")}
    digest = sha256_of(tmp_path / "snapshots" / "tiny" / "config.json")
    assert paths == {hub.cache_folder() / hub.FOLDERS / digest[:40] / "checkpoints" / "step_3"}


def test_the_card_of_a_model_says_how_to_ask_it_where_it_can_be_asked():
    for layout, encoder, asked in (
        ("fewshot", {"name": "memory"}, 1),
        ("pairs", None, 1),
        ("puzzle", None, 0),
    ):
        config = {"arch": {"name": "trm"}, "encoder": encoder}
        data = {"game": "sudoku", "layout": layout, "path": "d", "hash": "h"}
        info = {"config": config, "data": data, "parameters": {"core": 1}, "step": 1, "git_commit": None}
        assert model_card(NAME, info, [], None, "mit").count("predict.py") == asked


def test_a_shared_model_can_be_pushed_with_the_scores_it_came_with(trained, folder_hub, tmp_path):
    publish.publish(trained, tmp_path / "small")
    assert checkpoint.damage(checkpoint.resolve(tmp_path / "small")) == ""
    commit = pushed(tmp_path / "small")
    text = (folder_hub.folder(NAME) / "snapshots" / commit / "README.md").read_text()
    assert "| model | ARC/pass@1 |" in text and "| command | not recorded |" in text


def test_a_model_without_scores_or_averages_is_not_shared(fewshot, folder_hub, tmp_path):
    for name, more, words in (
        ("a", [], "no evaluation of step_1"),
        ("b", ["ema=false"], "no averaged weights"),
    ):
        folder = train_here(fewshot, tmp_path / name, "train_steps=1", *more)
        with pytest.raises(UserError, match=words):
            pushed(folder)
    assert not folder_hub.created


@pytest.mark.parametrize("text", ["hub:tiny", "hub:a/b@", "hub:a/b/c", "hub:"])
def test_another_form_of_a_name_is_refused(text, folder_hub):
    with pytest.raises(UserError, match="is no model on the hub: expected hub:owner/name@revision"):
        checkpoint.resolve(text)


def test_what_is_on_the_disk_comes_before_a_name_on_the_hub(folder_hub, tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert hub.reference("a/b", None) == "a/b" and hub.reference("a/c", "v1") == "hub:a/c@v1"
    assert hub.reference("runs/x/best", None) == "runs/x/best"
    with pytest.raises(UserError, match="a/b is no name on the hub, so it has no revision=v1"):
        hub.reference("a/b", "v1")


def test_a_hub_that_refuses_is_one_line(trained, folder_hub, monkeypatch, capsys):
    def refuse(*arguments, **options):
        raise OSError("403 Forbidden: you may not\nsee the documentation")

    monkeypatch.setattr(folder_hub, "create_repo", refuse)
    with pytest.raises(SystemExit) as ended:
        called(monkeypatch, publish.main, trained, f"hub:{NAME}")
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert said == f"error: cannot push to hub:{NAME}: 403 Forbidden: you may not\n"


def test_an_unknown_published_name_says_what_there_is(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        called(monkeypatch, published.main, "arc_v3")
    assert "arc_v3 is none of arc_v1, arc_v2, nor hub:owner/name@revision" in capsys.readouterr().err
