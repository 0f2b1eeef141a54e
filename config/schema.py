"""Types and cross-field rules of a training run and of an evaluation. The values stand in the YAML files beside this."""

from typing import Any, Literal

from pydantic import field_validator, model_validator

from config.base import Config
from dataset.batch import DataConfig
from evaluation.evaluate import EvaluationConfig
from models.encoders import ENCODERS
from models.losses import ObjectiveConfig
from models.trm import ArchConfig
from training.optim import OptimConfig
from training.step import ModeConfig
from utils.logging import LoggingConfig

LAYOUT_OF = {"trm": "puzzle", "etrm": "fewshot"}


class PretrainConfig(OptimConfig):
    """One training run (config/pretrain.yaml)."""

    project_name: str
    run_name: str | None
    output_dir: str
    seed: int
    device: Literal["auto", "cpu", "cuda"]
    global_batch_size: int
    train_steps: int
    max_seconds: float | None
    ema: bool
    ema_rate: float
    log_interval: int
    eval_interval: int | None
    checkpoint_interval: int
    keep_checkpoints: int
    resume: str
    max_nonfinite_steps: int
    arch: ArchConfig
    encoder: Any
    data: DataConfig
    mode: ModeConfig
    objective: ObjectiveConfig
    evaluation: EvaluationConfig
    logging: LoggingConfig

    @field_validator("encoder", mode="before")
    @classmethod
    def _typed_encoder(cls, value: Any) -> Config | None:
        return None if value is None else encoder_config(value)

    @model_validator(mode="after")
    def _check(self) -> "PretrainConfig":
        for name in ("global_batch_size", "train_steps", "log_interval", "checkpoint_interval", "keep_checkpoints", "max_nonfinite_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")
        if self.eval_interval is not None and self.eval_interval < 1:
            raise ValueError(f"eval_interval must be at least 1, or null for no evaluation, found {self.eval_interval}")
        if not 0 <= self.ema_rate < 1:
            raise ValueError(f"ema_rate must be within 0..1, found {self.ema_rate}")
        if not 0 <= self.lr_min_ratio <= 1:
            raise ValueError(f"lr_min_ratio must be within 0..1, found {self.lr_min_ratio}")
        if self.arch.name == "etrm" and self.encoder is None:
            raise ValueError("arch=etrm needs an encoder, for example encoder=memory")
        if self.arch.name == "trm" and self.encoder is not None:
            raise ValueError("arch=trm knows its task through the puzzle embedding and takes no encoder")
        if self.arch.name == "trm" and self.data.augmentation == "random":
            raise ValueError("arch=trm has one learned row per stored augmentation; set data.augmentation to table or none")
        several = len(self.data.sides) > 1
        if several and (self.arch.mlp_t or self.arch.pos_encodings in ("rope", "learned")):
            what = "arch.mlp_t=true" if self.arch.mlp_t else f"arch.pos_encodings={self.arch.pos_encodings}"
            raise ValueError(f"{what} needs one canvas size; use data.canvas=full, one entry in data.buckets, or arch.pos_encodings=rope2d")
        return self

    @property
    def layout(self) -> str:
        """The dataset layout this architecture trains on."""
        return LAYOUT_OF[self.arch.name]

    @property
    def name(self) -> str:
        """run_name, or one made of what the run is."""
        encoder = f"-{self.encoder.name}" if self.encoder else ""
        return self.run_name or f"{self.arch.name}{encoder}-{self.data.path.rstrip('/').rsplit('/', 1)[-1]}-seed{self.seed}"

    def to_dict(self) -> dict:
        """Plain values, as the checkpoint keeps them."""
        return {**self.model_dump(exclude={"encoder"}), "encoder": self.encoder and self.encoder.model_dump()}


def encoder_config(value: dict | Config) -> Config:
    """The typed configuration of the encoder that `value["name"]` names."""
    if isinstance(value, Config):
        return value
    name = value.get("name")
    if name not in ENCODERS:
        raise ValueError(f"encoder.name={name!r} is unknown; there are {', '.join(ENCODERS)}")
    return ENCODERS[name][0](**value)


class EvaluateConfig(EvaluationConfig):
    """One evaluation of a checkpoint (config/evaluate.yaml)."""

    checkpoint: str
    weights: Literal["ema", "raw"]
    data_path: str | None
    split: Literal["test", "train"]
    subsets: list[str] | None
    max_eval_groups: int | None
    seed: int
    device: Literal["auto", "cpu", "cuda"]
    output_dir: str | None
    report: bool
