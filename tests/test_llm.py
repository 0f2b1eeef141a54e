"""The baseline of a language model: tasks as text, and the whole chain on a tiny model made here."""

import json
import math

import numpy as np
import pytest
import torch

from baselines.llm import __main__ as command
from baselines.llm.answering import CellsAlone, logit
from baselines.llm.prompts import TASK, Example, Tokens, examples_of, grid_of, text_of
from baselines.llm.settings import LlmConfig
from config import compose
from dataset.augment import invert
from dataset.store import Store
from dataset.task import Pair, Task
from dataset.views import EvaluationSet
from dataset.writer import write_dataset
from evaluation import predictions
from tests.support.runs import called, data_config_of
from tools import compare
from utils.errors import UserError
from utils.files import read_json


@pytest.fixture(scope="module")
def easy(tmp_path_factory) -> Store:
    """Tasks of one row of two cells, which paint all cells in a colour of the task's own."""
    rng = np.random.default_rng(0)

    def task(name: str, colour: int) -> Task:
        grids = [rng.integers(0, 10, (1, 2)).astype(np.uint8) for _ in range(3)]
        pairs = [Pair(grid, np.full_like(grid, colour)) for grid in grids]
        return Task(name, tuple(pairs[:2]), tuple(pairs[2:]))

    folder = tmp_path_factory.mktemp("easy") / "data"
    tasks = {name: [task(f"{name}{i}", i) for i in range(n)] for name, n in (("a", 3), ("b", 2))}
    about = {"layout": "fewshot", "source": "made up", "seed": 0, "num_aug": 0, "max_grid_size": 2}
    write_dataset(folder, tasks, ["b"], **about)
    return Store.load(folder)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder with a random model of Llama's architecture, and a tokenizer that joins digits."""
    transformers = pytest.importorskip("transformers", reason="needs transformers: the extra llm")
    pytest.importorskip("peft", reason="needs peft: the extra llm")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["Input: Output: 0011223344 5566778899\n\n"] * 9, trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    config = transformers.LlamaConfig(
        vocab_size=len(fast),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=fast.bos_token_id,
        eos_token_id=fast.eos_token_id,
    )
    transformers.set_seed(0)
    folder = tmp_path_factory.mktemp("llm") / "model"
    model = transformers.LlamaForCausalLM(config)
    for weights in (model.lm_head.weight, model.model.embed_tokens.weight):
        torch.nn.init.normal_(weights, std=0.5)  # adapters leave both as they are
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokens(published) -> Tokens:
    from transformers import AutoTokenizer

    return Tokens(AutoTokenizer.from_pretrained(published))


def settings(easy, published, output, *more: str) -> list[str]:
    """A command line of the baseline at toy size."""
    data = [f"data.path={easy.path}", "data.buckets=[2]", "data.canvas_margin=0"]
    shape = ["device=cpu", "lr=1e-2", "train_views=2", "num_views=2", "train_batch_size=18", "accumulate=1"]
    return [f"model={published}", f"output_dir={output}", *data, *shape, *more]


@pytest.fixture(scope="module")
def tuned(easy, published, tmp_path_factory):
    """The folder of a model that has learned some training tasks, and was asked them."""
    output = tmp_path_factory.mktemp("tuned") / "run"
    more = ["action=all", "train_steps=60", "split=train", "attempts=2", "controls=[query_only]"]
    with pytest.MonkeyPatch.context() as patch:
        called(patch, command.main, *settings(easy, published, output, *more))
    return output


def test_views_as_text_read_back_as_the_right_answers(fewshot):
    questions = EvaluationSet(fewshot, data_config_of(fewshot), "test", 4, 0)
    examples = list(examples_of(questions))
    assert len(examples) == sum(map(questions.num_views_of, questions.queries))
    for example in examples:
        query = questions.queries[example.query]
        view, pair = questions.view(query, example.view), fewshot.pair(query.pair)
        assert np.array_equal(invert(grid_of(example.answer), *view), pair.output)
        assert example.question == f"\nInput:\n{text_of(pair.input, *view)}Output:\n"
        assert len(example.demonstrations) == len(query.demos) and len(example.answer) < example.budget


def test_query_only_shows_no_demonstration_and_shuffled_ones_are_anothers(fewshot):
    def texts(control: str) -> list[tuple[str, ...]]:
        found = EvaluationSet(fewshot, data_config_of(fewshot), "test", 1, 0, control)
        return [example.demonstrations for example in examples_of(found)]

    assert set(texts("query_only")) == {()}
    right, wrong = texts("none"), texts("shuffled_demonstrations")
    assert len(right) == len(wrong) and not any(set(a) & set(b) for a, b in zip(right, wrong, strict=True))


@pytest.mark.parametrize("text", ["", "\n", "12\n3\n", "1\n\n2\n", "1" * 31 + "\n", "1\n" * 31])
def test_what_is_no_grid_is_no_answer(text):
    assert grid_of(text).size == 0


@pytest.mark.parametrize("side", [1, 7, 30])
def test_every_cell_is_a_token_and_the_budget_holds_the_largest_grid(tokens, side):
    grid = np.random.default_rng(side).integers(0, 10, (side, side)).astype(np.uint8)
    text = text_of(grid, 0, np.arange(10, dtype=np.uint8))
    answer = [*tokens.encode(text), tokens.end]
    assert len(answer) == Example(0, 0, (), "", text, side).budget
    assert np.array_equal(grid_of(tokens.decode(answer)), grid)
    assert tokens.decode(answer[:-1]) == ""  # the end is missing
    if side > 1:
        assert len(tokens.tokenizer.encode(text, add_special_tokens=False)) < len(answer) - 1


def test_only_the_answer_is_trained(tokens, easy):
    from baselines.llm.tuning import IGNORED, padded, row_of

    examples = list(examples_of(EvaluationSet(easy, data_config_of(easy), "train", 1, 0)))[:3]
    rows = [row_of(tokens, example, 999) for example in examples]
    rows[0] = {name: values[-5:] for name, values in rows[0].items()}
    batch = padded(rows, tokens.end)
    trained = batch["labels"] != IGNORED
    assert torch.equal(batch["input_ids"][trained], batch["labels"][trained])
    assert batch["attention_mask"].sum(1).tolist() == [len(row["input_ids"]) for row in rows]
    for example, labels in zip(examples, batch["labels"].tolist(), strict=True):
        trained = [token for token in labels if token != IGNORED]
        assert tokens.decode(trained) == example.answer


def test_a_long_prompt_loses_its_first_demonstrations(tokens):
    example = Example(0, 0, ("\nInput:\n1\n", "\nInput:\n2\n"), "\nInput:\n3\n", None, 1)
    whole, left_out = tokens.fitted(example, 999)
    assert left_out == 0 and whole == [tokens.tokenizer.bos_token_id, *tokens.encode(example.prompt())]
    shorter, left_out = tokens.fitted(example, len(whole) - 1)
    assert left_out == 1 and shorter[1:] == tokens.encode(TASK + "\nInput:\n2\n\nInput:\n3\n")
    assert tokens.fitted(example, len(shorter) - 1) is None


def test_a_tokenizer_without_tokens_for_cells_is_refused(tokens, monkeypatch):
    monkeypatch.setattr(tokens.tokenizer, "encode", lambda text, **options: [7])
    with pytest.raises(UserError, match="no tokens of their own for digits"):
        Tokens(tokens.tokenizer)


def test_probabilities_are_those_of_the_permitted_tokens_up_to_the_end():
    cells = CellsAlone([5, 3])
    scores = torch.randn(2, 4, 6)
    masked = [cells(None, scores[:, step]) for step in range(4)]
    assert all(torch.isinf(one[:, [0, 1, 2, 4]]).all() for one in masked)
    expected = scores[:, :, [5, 3]].log_softmax(-1)
    found = cells.log_probabilities([[5, 5, 3, 3], [3, 9, 9, 9]])  # 3 ends a text
    assert found == pytest.approx([float(expected[0, 0, 0] + expected[0, 1, 0] + expected[0, 2, 1]),
                                   float(expected[1, 0, 1])], abs=1e-5)  # fmt: skip


@pytest.mark.parametrize("p", [1e-9, 0.25, 0.5, 1.0])
def test_the_logit_of_a_probability_gives_it_back(p):
    assert 1 / (1 + math.exp(-logit(math.log(p)))) == pytest.approx(p)


def test_what_was_learned_is_answered_in_every_view_and_scored_as_other_models_are(tuned, easy, published):
    about = read_json(tuned / "adapter" / "llm.json")
    assert about["steps"] == 60 and about["examples"] == 18 and about["losses"][-1]["loss"] < 0.5
    folder = tuned / "evaluations" / "adapter-train"
    results = read_json(folder / "results.json")
    scores = {(one["metric"], one["control"]): one["value"] for one in results["scores"]}
    assert scores["ARC/pass@1", "none"] > 0.8 > scores["ARC/pass@1", "query_only"]
    assert scores["ARC/pass@1", "oracle"] >= scores["ARC/pass@1", "none"]
    assert results["protocol"] == "transductive" and results["counts"]["views"] == 18
    assert len(predictions.load(folder).predictions) == 18 * 2
    names = compare.read(folder).ranks.keys()
    assert names == read_json(folder / "submission.json").keys() == {"a0", "a1", "a2"}
    assert (folder / "report.html").is_file()


def test_what_a_model_is_published_with_changes_no_answer(published, easy, tmp_path):
    from transformers import AutoTokenizer, GenerationConfig, LlamaForCausalLM

    from baselines.llm.answering import answered, questions_of
    from baselines.llm.tuning import load

    LlamaForCausalLM.from_pretrained(published).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(published).save_pretrained(tmp_path / "model")
    GenerationConfig(repetition_penalty=9.0, do_sample=True, temperature=0.1).save_pretrained(
        tmp_path / "model"
    )
    found = []
    for model in (published, tmp_path / "model"):
        config = compose.load(LlmConfig, "llm", settings(easy, model, tmp_path / "run", "attempts=2"))
        asked = answered(config, questions_of(config, easy, "test", 2), load(config))
        logits = asked.predictions.columns["q_halt_logit"].tolist()
        found.append((list(asked.predictions.answers), logits))
    assert found[0] == found[1]


def test_prepared_texts_have_a_line_for_every_view(tuned):
    for name, queries in (("train", 9), ("test", 2)):
        lines = [json.loads(line) for line in (tuned / f"{name}.jsonl").read_text().splitlines()]
        assert len(lines) == 2 * queries
        assert all(grid_of(line["output"]).size == 2 for line in lines)
        assert all(line["input"].count("Output:\n") == 3 for line in lines)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["action=eval"], "no adapter in .*: action=train makes one"),
        (["action=train", "quantize=4bit"], "quantize=4bit needs a GPU"),
        (["action=train", "max_length=9"], "none of 18 examples fits max_length=9"),
        (["action=train", "model=not/a/folder"], "cannot load model=not/a/folder"),
        (["vote_stop=true"], "a language model is asked every view"),
    ],
)
def test_a_mistake_is_one_line(words, message, easy, published, tmp_path):
    with pytest.raises(UserError, match=message):
        config = compose.load(LlmConfig, "llm", settings(easy, published, tmp_path / "run", *words))
        command.run(config)
