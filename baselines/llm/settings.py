"""What the baseline of a language model can be told (config/llm.yaml)."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from dataset.batch import DataConfig
from evaluation.voting import VotingConfig


class LlmConfig(VotingConfig):
    """Fine-tuning and evaluation of a causal language model."""

    action: Literal["prepare", "train", "eval", "all"]
    data: DataConfig
    model: str
    revision: str | None
    quantize: Literal["auto", "4bit", "none"]
    output_dir: str
    seed: NonNegativeInt
    device: Literal["auto", "cpu", "cuda"]
    max_length: PositiveInt
    train_views: PositiveInt
    epochs: PositiveInt
    train_steps: PositiveInt | None
    lr: PositiveFloat
    lr_warmup_steps: NonNegativeInt
    weight_decay: NonNegativeFloat
    train_batch_size: PositiveInt
    accumulate: PositiveInt
    lora_rank: PositiveInt
    lora_alpha: PositiveInt
    lora_dropout: Annotated[float, Field(ge=0, lt=1)]
    split: Literal["test", "train"]
    fine_tuned: bool
    attempts: PositiveInt
    temperature: PositiveFloat
    report: bool

    @model_validator(mode="after")
    def _check_votes(self) -> "LlmConfig":
        if self.vote_stop or self.ranking == "agreement":
            raise ValueError(
                f"vote_stop={self.vote_stop} ranking={self.ranking}: a language model is asked every view, "
                "and never about its demonstrations"
            )
        return self
