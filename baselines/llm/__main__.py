"""A language model on ARC as text.

    python -m baselines.llm action=all data=arc1 output_dir=runs/llm

prepare writes the tasks as text, train fine-tunes an adapter, eval writes the files of evaluate.py and prints
its table (docs/llm-baseline.md).
"""

import json
import shlex
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from baselines.llm.answering import evaluate, questions_of
from baselines.llm.prompts import examples_of
from baselines.llm.settings import LlmConfig
from baselines.llm.tuning import (
    ABOUT,
    LanguageModel,
    adapter_folder,
    check_installed,
    fine_tune,
    load,
    load_tuned,
)
from config.compose import launch
from dataset.store import Store
from dataset.views import EvaluationSet
from evaluate import table
from evaluation.folder import RESULTS, files_of, write_files
from utils.device import describe, explains_out_of_memory
from utils.distributed import World
from utils.environment import git_commit
from utils.errors import UserError, reports_user_errors
from utils.files import check_replaceable, sha256_of, write_atomically


def run(config: LlmConfig) -> None:
    """What `action` says, one after the other."""
    if World.from_environment().size > 1:
        raise UserError("the baseline of a language model runs as one process, not under torchrun")
    if config.action != "prepare":
        check_installed()
    store = Store.load(config.data.path, "fewshot")
    actions = {"prepare": prepare, "train": train, "eval": evaluate_and_write}
    for name in actions if config.action == "all" else (config.action,):
        actions[name](config, store)


def prepare(config: LlmConfig, store: Store) -> None:
    """Write what is trained and asked as text: a line for every view of a query."""
    for split, views in (("train", config.train_views), ("test", config.num_views)):
        questions = questions_of(config, store, split, views)
        lines = list(map(json.dumps, _texts(questions)))
        path, text = Path(config.output_dir) / f"{split}.jsonl", "".join(line + "\n" for line in lines)
        write_atomically(path, partial(Path.write_text, data=text, encoding="utf-8"))
        print(f"{path}: {len(lines)} prompts of {len(questions.tasks)} tasks", flush=True)


def _texts(questions: EvaluationSet) -> list[dict[str, Any]]:
    names, queries = questions.store.task_ids, questions.queries
    return [
        {
            "task": names[queries[example.query].task],
            "query": queries[example.query].number,
            "view": example.view,
            "input": example.prompt(),
            "output": example.answer,
        }
        for example in examples_of(questions)
    ]


def train(config: LlmConfig, store: Store) -> None:
    """Fine-tune on every pair of the training tasks, the task's other pairs as demonstrations."""
    check_replaceable(adapter_folder(config), ABOUT)  # before hours of work, not after them
    examples = list(examples_of(questions_of(config, store, "train", config.train_views)))
    fine_tune(config, examples, _dataset(config, store))
    print(f"{adapter_folder(config)}; python -m baselines.llm action=eval asks it", flush=True)


def evaluate_and_write(config: LlmConfig, store: Store) -> None:
    """Ask, print the table of scores and write the files."""
    kind = "adapter" if config.fine_tuned else "published"
    folder = Path(config.output_dir) / "evaluations" / f"{kind}-{config.split}"
    check_replaceable(folder, RESULTS)
    started = time.monotonic()
    language = load_tuned(config) if config.fine_tuned else load(config)
    with explains_out_of_memory("the evaluation", f"lower batch_size={config.batch_size}"):
        evaluation = evaluate(config, store, language)
    about = {
        **_about(config, store, language),
        "num_views": evaluation.num_views,
        "seconds": round(time.monotonic() - started, 2),
    }
    write_files(folder, evaluation, about, with_report=config.report, with_predictions=True)
    print(table(evaluation, config), flush=True)
    print(f"{folder}: {', '.join(files_of(config.report, True))}")


def _dataset(config: LlmConfig, store: Store) -> dict[str, Any]:
    metadata = store.metadata
    return {"path": config.data.path, "layout": metadata.layout, "sha256": metadata.content_hash}


def _about(config: LlmConfig, store: Store, language: LanguageModel) -> dict[str, Any]:
    """What results.json says of model, data, settings and machine, as for every model."""
    adapter, about, parameters = adapter_folder(config), language.about, language.model.num_parameters()
    file = "adapter_model.safetensors"
    tuned = [value.numel() for name, value in language.model.named_parameters() if "lora_" in name]
    on_gpu = language.device.type == "cuda"
    return {
        "dataset": _dataset(config, store),
        "checkpoint": {
            "path": str(adapter) if about else config.model,
            "step": about.get("steps", 0),
            "weights": "adapter" if about else "published",
            "file": file if about else None,
            "sha256": sha256_of(adapter / file) if about else None,
            "git_commit": about.get("git_commit"),
        },
        "model": {
            "arch": config.model,
            "encoder": None,
            "parameters": {"total": parameters, "adapter": sum(tuned)},
            "forward_dtype": str(language.model.dtype).removeprefix("torch."),
        },
        **config.model_dump(include={"split", "attempts", "temperature", "batch_size", "seed", "ranking"}),
        "max_eval_groups": config.data.max_eval_groups,
        "adaptation": {"name": "auto"},
        "git_commit": git_commit(),
        "torch": torch.__version__,
        "device": describe(language.device),
        "processes": 1,
        "peak_gpu_memory_bytes": torch.cuda.max_memory_allocated(language.device) if on_gpu else None,
        "settings": config.model_dump(mode="json"),
        "command": shlex.join(["python", "-m", "baselines.llm", *sys.argv[1:]]),
    }


@reports_user_errors
def main() -> None:
    launch("llm", LlmConfig, run, __doc__)


if __name__ == "__main__":
    main()
