"""A causal language model: loaded, fine-tuned by low-rank adapters on 4-bit weights (QLoRA), and kept."""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from baselines.llm.prompts import Example, Tokens
from baselines.llm.settings import LlmConfig
from utils.device import choose_device, explains_out_of_memory, faster_dtype
from utils.distributed import World
from utils.environment import git_commit
from utils.errors import UserError
from utils.extras import require
from utils.files import directory_written_whole, read_json, write_json

ABOUT = "llm.json"
IGNORED = -100  # the label of a token that no loss is computed of


@dataclass(frozen=True)
class LanguageModel:
    """A model on its device, with its tokens. about: llm.json of its adapter, empty without one."""

    model: Any
    tokens: Tokens
    device: torch.device
    about: dict[str, Any]


def adapter_folder(config: LlmConfig) -> Path:
    """Where a fine-tuned model is kept: its adapter alone."""
    return Path(config.output_dir) / "adapter"


def check_installed() -> None:
    """Raise `UserError` unless the packages are there that every language model needs."""
    for package in ("transformers", "peft"):
        require(package, "a language model")


def load(config: LlmConfig) -> LanguageModel:
    """The model as it was published, on the device. Raises `UserError` where it cannot be had."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig

    device = choose_device(config.device, World())
    dtype = getattr(torch, faster_dtype(device)[0])
    options: dict[str, Any] = {"revision": config.revision, "dtype": dtype, "device_map": {"": device}}
    if config.quantize == "4bit" or (config.quantize == "auto" and device.type == "cuda"):
        if device.type != "cuda":
            raise UserError("quantize=4bit needs a GPU; quantize=none trains adapters on whole weights")
        require("bitsandbytes", "quantize=4bit", "quantize=none")
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.model, revision=config.revision)
        model = AutoModelForCausalLM.from_pretrained(config.model, **options)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        why = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"cannot load model={config.model}: {why}") from None
    # What a model is published with, such as a penalty on repeated tokens, is meant for prose, not for grids.
    model.generation_config = GenerationConfig()
    return LanguageModel(model, Tokens(tokenizer), device, {})


def load_tuned(config: LlmConfig) -> LanguageModel:
    """The model with the adapter in `output_dir`. Raises `UserError` where there is none for it."""
    folder = adapter_folder(config)
    if not (folder / ABOUT).is_file():
        raise UserError(f"no adapter in {folder}: action=train makes one, fine_tuned=false asks without")
    about = read_json(folder / ABOUT)
    found, asked = (about["model"], about["revision"]), (config.model, config.revision)
    if found != asked:
        raise UserError(f"{folder} belongs to model={found[0]} revision={found[1]}, not to {asked[0]}")
    published = load(config)
    from peft import PeftModel

    model = PeftModel.from_pretrained(published.model, folder)
    return LanguageModel(model, published.tokens, published.device, about)


def fine_tune(config: LlmConfig, examples: list[Example], dataset: dict[str, Any]) -> None:
    """Train an adapter on the answers to `examples`, and write it. dataset: what llm.json says of the data.

    Raises `UserError` where no example is short enough.
    """
    published = load(config)
    if published.device.type == "cuda" and torch.cuda.device_count() > 1:
        raise UserError("fine-tuning uses one GPU; CUDA_VISIBLE_DEVICES=0 hides the others")
    rows = [row for row in (row_of(published.tokens, one, config.max_length) for one in examples) if row]
    if not rows:
        raise UserError(f"none of {len(examples)} examples fits max_length={config.max_length} tokens")
    print(f"{len(rows)} of {len(examples)} examples fit max_length={config.max_length} tokens", flush=True)
    with explains_out_of_memory("fine-tuning", "lower train_batch_size and raise accumulate"):
        model, steps, losses = _trained(config, published, rows)
    with directory_written_whole(adapter_folder(config), marker=ABOUT) as folder:
        model.save_pretrained(folder)
        about = {
            "model": config.model,
            "revision": config.revision,
            "steps": steps,
            "examples": len(rows),
            "too_long": len(examples) - len(rows),
            "losses": losses,
            "dataset": dataset,
            "git_commit": git_commit(),
            "command": shlex.join(["python", "-m", "baselines.llm", *sys.argv[1:]]),
            "settings": config.model_dump(mode="json"),
        }
        write_json(folder / ABOUT, about, indent=1)


def row_of(tokens: Tokens, example: Example, max_length: int) -> dict[str, list[int]] | None:
    """The tokens of an example whose answer is known, and their labels: those of the answer alone.

    None where it is too long.
    """
    assert example.answer is not None
    answer = [*tokens.encode(example.answer), tokens.end]
    fitted = tokens.fitted(example, max_length - len(answer))
    if fitted is None:
        return None
    prompt, _ = fitted
    return {"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer}


def padded(rows: list[dict[str, list[int]]], pad: int) -> dict[str, Tensor]:
    """input_ids, labels and attention_mask (B, S) of rows, filled at their ends."""
    longest = max(len(row["input_ids"]) for row in rows)

    def filled(name: str, value: int) -> Tensor:
        return torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in rows])

    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    mask = (torch.arange(longest) < lengths[:, None]).long()
    return {
        "input_ids": filled("input_ids", pad),
        "labels": filled("labels", IGNORED),
        "attention_mask": mask,
    }


def _trained(
    config: LlmConfig, published: LanguageModel, rows: list[dict[str, list[int]]]
) -> tuple[Any, int, list[dict[str, float]]]:
    """The model with a trained adapter, its updates, and the losses on the way."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import Trainer, TrainingArguments, set_seed

    set_seed(config.seed)
    model, on_gpu = published.model, published.device.type == "cuda"
    quantized = getattr(model, "is_loaded_in_4bit", False)
    if quantized:
        model = prepare_model_for_kbit_training(model)
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    arguments = TrainingArguments(
        output_dir=config.output_dir,
        per_device_train_batch_size=config.train_batch_size,
        gradient_accumulation_steps=config.accumulate,
        activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": False},
        num_train_epochs=config.epochs,
        max_steps=config.train_steps or -1,
        learning_rate=config.lr,
        warmup_steps=config.lr_warmup_steps,
        weight_decay=config.weight_decay,
        optim="paged_adamw_8bit" if quantized else "adamw_torch",
        bf16=on_gpu and faster_dtype(published.device)[0] == "bfloat16",
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
        seed=config.seed,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
    )
    model = get_peft_model(model, lora)
    trainer = Trainer(model, arguments, lambda batch: padded(batch, published.tokens.end), rows)
    steps = trainer.train().global_step
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    return model, steps, [{name: entry[name] for name in ("step", "loss")} for entry in logged]
