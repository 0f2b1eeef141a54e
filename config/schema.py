"""Types and cross-field rules of a training run, of an evaluation and of questions. The YAML files hold the values."""

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, SerializeAsAny, field_validator, model_validator

from config.base import Config
from dataset.batch import DataConfig
from dataset.store import Layout
from dataset.task import MAX_SIDE
from evaluation.evaluate import EvaluationConfig
from evaluation.protocols import ProtocolConfig, protocol_config
from models.context import EncoderConfig
from models.core import ArchConfig
from models.encoders import ENCODERS
from models.encoders.pairs import PairConfig
from models.pretrained import PretrainedConfig
from models.trm import arch_config
from training.optim import OptimConfig
from training.splits import DescentConfig, Sizes
from training.step import FixedStepsConfig, ModeConfig, mode_config
from utils.logging import LoggingConfig


def layouts_of(encoder: Any) -> tuple[Layout, ...]:
    """The dataset layouts a model can read: an encoder reads episodes, puzzle rows need a dataset with identifiers."""
    return ("fewshot",) if encoder else ("puzzle", "pairs")


def _protocol(value: Any) -> Any:
    return protocol_config(value) if isinstance(value, dict) else value


class PretrainConfig(OptimConfig, PretrainedConfig):
    """One training run (config/pretrain.yaml)."""

    project_name: str
    run_name: Annotated[str, Field(pattern=r"^[\w.][\w.=,+-]*$")] | None
    output_dir: str
    seed: NonNegativeInt
    device: Literal["auto", "cpu", "cuda"]
    compile: Literal["auto"] | bool
    global_batch_size: PositiveInt
    micro_batch_size: PositiveInt | None
    train_steps: NonNegativeInt
    max_seconds: PositiveFloat | None
    ema: bool
    ema_rate: Annotated[float, Field(ge=0, lt=1)]
    log_interval: PositiveInt
    eval_interval: PositiveInt | None
    eval_tasks: PositiveInt | None
    validation: PositiveInt | Annotated[float, Field(gt=0, lt=1)] | None
    best_metric: str
    patience: PositiveInt | None
    checkpoint_interval: PositiveInt
    checkpoint_minutes: PositiveFloat | None
    keep_checkpoints: PositiveInt
    keep_best_checkpoints: NonNegativeInt
    resume: str
    timeout_minutes: PositiveFloat
    max_nonfinite_steps: PositiveInt
    arch: SerializeAsAny[ArchConfig]
    encoder: SerializeAsAny[EncoderConfig] | None
    data: DataConfig
    mode: SerializeAsAny[ModeConfig]
    objective: DescentConfig
    evaluation: EvaluationConfig
    logging: LoggingConfig

    @field_validator("arch", mode="before")
    @classmethod
    def _typed_arch(cls, value: Any) -> ArchConfig:
        return value if isinstance(value, ArchConfig) else arch_config(value)

    @field_validator("encoder", mode="before")
    @classmethod
    def _typed_encoder(cls, value: Any) -> EncoderConfig | None:
        if value is None or isinstance(value, EncoderConfig):
            return value
        if value.get("name") not in ENCODERS:
            raise ValueError(f"encoder.name={value.get('name')!r} is unknown; there are {', '.join(ENCODERS)}")
        return ENCODERS[value["name"]][0](**value)

    @field_validator("mode", mode="before")
    @classmethod
    def _typed_mode(cls, value: Any) -> ModeConfig:
        return value if isinstance(value, ModeConfig) else mode_config(value)

    @model_validator(mode="after")
    def _check_training(self) -> "PretrainConfig":
        mode, objective = self.mode, self.objective
        if isinstance(mode, FixedStepsConfig):
            if mode.num_act_steps != self.arch.halt_max_steps:
                raise ValueError(
                    f"mode.num_act_steps={mode.num_act_steps} are trained and arch.halt_max_steps={self.arch.halt_max_steps} would be "
                    "evaluated; leave out arch.halt_max_steps, which follows"
                )
            if self.train_steps % mode.num_act_steps:
                raise ValueError(
                    f"train_steps={self.train_steps} counts updates and is not divisible by mode.num_act_steps={mode.num_act_steps}"
                )
        if mode.name == "cached":
            if self.encoder is None or ENCODERS[self.encoder.name][1].refines:
                found = self.encoder.name if self.encoder else "none"
                raise ValueError(f"mode=cached keeps what an encoder reads once per sample, found encoder={found}")
            for name in ("reconstruct", "contrastive"):
                if objective.weight(name):
                    raise ValueError(f"mode=cached with objective.{name}_weight={objective.weight(name)} would not starve the encoder")
        if self.latent_step_from is not None and (self.encoder is None or mode.name == "cached"):
            why = "mode=cached keeps the first context" if self.encoder else "needs an encoder, whose context it moves"
            raise ValueError(f"latent_step_from={self.latent_step_from}: {why}")
        if objective.contrastive_weight and self.micro_batch_size is not None:
            raise ValueError(
                f"objective.contrastive_weight={objective.contrastive_weight} compares all samples of a batch,"
                f" which micro_batch_size={self.micro_batch_size} would take apart; set micro_batch_size=null"
            )
        sizes = Sizes(self.arch.halt_max_steps, self.global_batch_size, self.data.sides[-1] ** 2)
        objective.refuse(mode.name, getattr(self.arch, "H_cycles", 1), sizes)
        for name in ("encoder_lr", "encoder_weight_decay"):
            if getattr(self, name) is not None and not self.encoder:
                raise ValueError(
                    f"{name}={getattr(self, name)} needs an encoder; puzzle rows have puzzle_emb_lr and puzzle_emb_weight_decay"
                )
        if self.freeze_encoder_steps and (self.freeze_decoder_steps or not self.encoder):
            why = f"and freeze_decoder_steps={self.freeze_decoder_steps} leave nothing to train" if self.encoder else "needs an encoder"
            raise ValueError(f"freeze_encoder_steps={self.freeze_encoder_steps} {why}")
        return self

    @model_validator(mode="after")
    def _check(self) -> "PretrainConfig":
        if self.arch.name == "etrm" and self.encoder is None:
            raise ValueError("arch=etrm needs an encoder, for example encoder=memory")
        for name in ("patience", "keep_best_checkpoints"):
            if getattr(self, name) and not (self.validation and self.eval_interval):
                raise ValueError(f"{name} needs validation and eval_interval: what chooses by the test tasks' scores has seen them")
        if self.validation and self.eval_tasks:
            raise ValueError(f"eval_tasks={self.eval_tasks} limits the test tasks, but validation={self.validation} evaluates others")
        if self.encoder is None and not self.arch.puzzle_emb_ndim:
            raise ValueError("arch.puzzle_emb_ndim must be at least 1: without an encoder the task is known only by its puzzle row")
        for name in ("reconstruct", "contrastive"):
            if self.objective.weight(name) and not self.encoder:
                raise ValueError(f"objective.{name}_weight={self.objective.weight(name)} needs demonstrations, which an encoder reads")
        if self.evaluation.ranking == "agreement" and not self.encoder:
            raise ValueError("evaluation.ranking=agreement asks the demonstrations, which only a model with an encoder reads")
        if self.objective.kl_weight and not (self.encoder and self.encoder.gives_kl):
            raise ValueError(f"objective.kl_weight={self.objective.kl_weight} weighs nothing: the context is not variational")
        what = "arch.mlp_t=true" if self.arch.mlp_t else f"arch.pos_encodings={self.arch.pos_encodings}"
        if len(self.data.sides) > 1 and (self.arch.mlp_t or self.arch.pos_encodings in ("rope", "learned")):
            raise ValueError(f"{what} needs one canvas size; use data.canvas=full, one entry in data.buckets, or arch.pos_encodings=rope2d")
        if self.encoder:
            # Checkpoints may hold what was set without effect; a new run may not.
            for name, (reader, reads) in self.encoder.readers.items():
                if not reads and (value := getattr(self.encoder, name)) is not None:
                    raise ValueError(f"encoder.{name}={value} is read only with {reader}; leave it null")
            if self.data.sides[-1] > MAX_SIDE:
                raise ValueError(f"an encoder reads ARC grids, up to {MAX_SIDE} cells a side; data.buckets ends with {self.data.sides[-1]}")
            if self.arch.hidden_size // self.arch.num_heads % 4:
                raise ValueError("an encoder places cells in two dimensions and needs arch.hidden_size / arch.num_heads divisible by 4")
            heads = getattr(self.encoder, "num_heads", None) or self.arch.num_heads
            if heads < 2 and getattr(self.encoder, "positions", None) == "rope2d_values":
                raise ValueError(f"encoder.positions=rope2d_values turns the values of half of the encoder's heads, found {heads}")
            unplaced = isinstance(self.encoder, PairConfig) and self.encoder.num_layers == 0 and self.encoder.positions != "embedded"
            if unplaced and not self.arch.pos_encodings.startswith("rope"):
                raise ValueError(
                    f"encoder.num_layers=0 leaves the places of cells to the core, which arch.pos_encodings={self.arch.pos_encodings} does "
                    "not tell it; use at least 1, or encoder.positions=embedded"
                )
            if self.arch.mlp_t and self.encoder.gives_memory:
                raise ValueError(f"arch.mlp_t=true has no attention that could read the memory of encoder={self.encoder.name}")
            if self.encoder.prefix_grows and (self.arch.mlp_t or self.arch.pos_encodings == "learned"):
                raise ValueError(f"{what} needs a state of fixed length, but encoder.placement=prefix grows with the demonstrations")
        return self

    @property
    def warnings(self) -> list[str]:
        """What a valid run says of itself at its start."""
        found = [self.mode.warning] if self.mode.warning else []
        if self.encoder and self.encoder.gives_kl and not self.objective.kl_weight:
            found.append("objective.kl_weight=0: nothing keeps the latents of the encoder near their prior (the ancestor: 1e-4)")
        return found

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """The dataset layouts this model trains on."""
        return layouts_of(self.encoder)

    @property
    def name(self) -> str:
        """run_name, or one made of what the run is."""
        encoder = f"-{self.encoder.name}" if self.encoder else ""
        return self.run_name or f"{self.arch.name}{encoder}-{self.data.path.rstrip('/').rsplit('/', 1)[-1]}-seed{self.seed}"


class EvaluateConfig(EvaluationConfig):
    """One evaluation of a checkpoint (config/evaluate.yaml).

    halt_max_steps, halt_threshold: as trained, or others for this evaluation. save_predictions, record_steps: keep every
    view's answer, and those after every ACT step.
    """

    checkpoint: str
    weights: Literal["ema", "raw"]
    protocol: SerializeAsAny[ProtocolConfig]
    data_path: str | None
    split: Literal["test", "train", "validation"]
    subsets: list[str] | None
    max_eval_groups: PositiveInt | None
    seed: NonNegativeInt
    device: Literal["auto", "cpu", "cuda"]
    timeout_minutes: PositiveFloat
    output_dir: str | None
    report: bool
    halt_max_steps: PositiveInt | Literal["checkpoint"]
    halt_threshold: Annotated[float, Field(gt=0, lt=1)] | Literal["checkpoint"] | None
    save_predictions: bool
    record_steps: bool

    _typed_protocol = field_validator("protocol", mode="before")(_protocol)

    @model_validator(mode="after")
    def _check_predictions(self) -> "EvaluateConfig":
        if self.record_steps and not self.save_predictions:
            raise ValueError("record_steps=true needs save_predictions=true, which keeps what it records")
        if self.save_predictions and self.vote_stop:
            raise ValueError("save_predictions=true keeps every view's answer, and vote_stop=true would leave views out")
        return self


class AskConfig(Config):
    """Which checkpoint is asked which task."""

    checkpoint: str
    task: str
    task_id: str | None
    weights: Literal["ema", "raw"]
    protocol: SerializeAsAny[ProtocolConfig]
    num_views: PositiveInt
    seed: NonNegativeInt
    device: Literal["auto", "cpu", "cuda"]

    _typed_protocol = field_validator("protocol", mode="before")(_protocol)

    @field_validator("task_id", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) else value


class PredictConfig(AskConfig):
    """Answers to one task (config/predict.yaml)."""

    batch_size: PositiveInt
    format: Literal["text", "json"]
    page: str | None


class TimelineConfig(AskConfig):
    """Pictures of one answer's refinement (config/timeline.yaml)."""

    pair_index: NonNegativeInt
    view: NonNegativeInt
    target: bool
    diff: bool
    dpi: Annotated[int, Field(ge=20, le=600)]
    columns: PositiveInt
    output: str
