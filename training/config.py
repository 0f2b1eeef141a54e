"""What a training run is: its model, its data, its steps, and the rules between them. The YAML files hold the
values."""

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, SerializeAsAny, field_validator, model_validator

from dataset.batch import DataConfig
from dataset.layouts import LayoutName
from models.arch import ArchConfig
from models.context import EncoderConfig
from models.encoders import ENCODERS, encoder_config
from models.pretrained import PretrainedConfig
from models.trm import arch_config
from training.splits import Sizes
from training.step import FixedStepsConfig, StepConfig


class TrainingConfig(StepConfig, PretrainedConfig):
    """A run as `training.start.Run` assembles it.

    run_name: null is made of arch, encoder, dataset and seed. threads: of the CPU, in each process; auto: the
    faster of one and all. validation: training tasks that are held out, a number or a share. resume: auto,
    never, or a checkpoint's path. timeout_minutes: how long a process waits for another one. deterministic:
    refuse operations that may give other bits each time.
    """

    run_name: Annotated[str, Field(pattern=r"^\.*\w[\w.=,+-]*$")] | None
    output_dir: str
    device: Literal["auto", "cpu", "cuda"]
    threads: Literal["auto"] | PositiveInt
    compile: Literal["auto"] | bool
    deterministic: bool
    ema: bool
    ema_rate: Annotated[float, Field(ge=0, lt=1)]
    validation: PositiveInt | Annotated[float, Field(gt=0, lt=1)] | None
    resume: str
    timeout_minutes: PositiveFloat
    arch: SerializeAsAny[ArchConfig]
    encoder: SerializeAsAny[EncoderConfig] | None
    data: DataConfig

    @field_validator("arch", mode="before")
    @classmethod
    def _typed_arch(cls, value: Any) -> ArchConfig:
        return value if isinstance(value, ArchConfig) else arch_config(value)

    @field_validator("encoder", mode="before")
    @classmethod
    def _typed_encoder(cls, value: Any) -> EncoderConfig | None:
        return value if value is None or isinstance(value, EncoderConfig) else encoder_config(value)

    @model_validator(mode="after")
    def _check_mode(self) -> "TrainingConfig":
        mode, objective = self.mode, self.objective
        if isinstance(mode, FixedStepsConfig):
            if mode.num_act_steps != self.arch.halt_max_steps:
                raise ValueError(
                    f"mode.num_act_steps={mode.num_act_steps} are trained and arch.halt_max_steps="
                    f"{self.arch.halt_max_steps} would be evaluated; leave out arch.halt_max_steps, which "
                    "follows"
                )
            if self.train_steps % mode.num_act_steps:
                raise ValueError(
                    f"train_steps={self.train_steps} counts updates and is not divisible by "
                    f"mode.num_act_steps={mode.num_act_steps}"
                )
        if mode.name == "cached":
            if self.encoder is None or ENCODERS[self.encoder.name][1].refines:
                found = self.encoder.name if self.encoder else "none"
                raise ValueError(
                    f"mode=cached keeps what an encoder reads once per sample, found encoder={found}"
                )
            for name in ("reconstruct", "contrastive"):
                if objective.weight(name):
                    raise ValueError(
                        f"mode=cached with objective.{name}_weight={objective.weight(name)} would not "
                        "starve the encoder"
                    )
        if self.latent_step_from is not None and (self.encoder is None or mode.name == "cached"):
            why = (
                "mode=cached keeps the first context"
                if self.encoder
                else "needs an encoder, whose context it moves"
            )
            raise ValueError(f"latent_step_from={self.latent_step_from}: {why}")
        sizes = Sizes(self.arch.halt_max_steps, self.global_batch_size, self.data.sides[-1] ** 2)
        objective.refuse(mode.name, getattr(self.arch, "H_cycles", 1), sizes)
        return self

    @model_validator(mode="after")
    def _check_depth(self) -> "TrainingConfig":
        stages, arch = self.depth_schedule, self.arch
        if stages is None:
            return self
        named = f"depth_schedule={stages}"
        own = getattr(arch, "H_cycles", None), getattr(arch, "L_cycles", None)
        if None in own:
            raise ValueError(f"{named}: arch={arch.name} has no H_cycles and L_cycles to schedule")
        if not all(len(stage) == 3 and all(type(n) is int and n > 0 for n in stage[1:]) for stage in stages):
            raise ValueError(f"{named} must hold [share of the training, H_cycles, L_cycles] each")
        starts = [stage[0] for stage in stages]
        if starts != sorted(set(starts)) or not starts or starts[0] != 0 or starts[-1] >= 1:
            raise ValueError(f"{named} must have ascending shares below 1, the first one 0")
        if tuple(stages[-1][1:]) != own:
            raise ValueError(
                f"{named} must end with the depth that is evaluated, arch.H_cycles={own[0]} "
                f"arch.L_cycles={own[1]}"
            )
        if "cycle" in self.objective.axes:
            split = f"objective.split={self.objective.split}"
            raise ValueError(f"{named} changes the number of H cycles, which {split} compares")
        latents = getattr(arch, "num_latents", 1)
        if latents > min(stage[2] for stage in stages):
            raise ValueError(
                f"{named}: arch.num_latents={latents} needs L_cycles of at least that throughout"
            )
        return self

    @model_validator(mode="after")
    def _check_optimisation(self) -> "TrainingConfig":
        for name in ("encoder_lr", "encoder_weight_decay"):
            if getattr(self, name) is not None and not self.encoder:
                raise ValueError(
                    f"{name}={getattr(self, name)} needs an encoder; "
                    "puzzle rows have puzzle_emb_lr and puzzle_emb_weight_decay"
                )
        if self.freeze_encoder_steps and (self.freeze_decoder_steps or not self.encoder):
            both = f"and freeze_decoder_steps={self.freeze_decoder_steps} leave nothing to train"
            raise ValueError(
                f"freeze_encoder_steps={self.freeze_encoder_steps} "
                f"{both if self.encoder else 'needs an encoder'}"
            )
        return self

    @model_validator(mode="after")
    def _check_model(self) -> "TrainingConfig":
        arch, encoder, objective = self.arch, self.encoder, self.objective
        if arch.name == "etrm" and encoder is None:
            raise ValueError("arch=etrm needs an encoder, for example encoder=memory")
        if encoder is None and not arch.puzzle_emb_ndim:
            raise ValueError(
                "arch.puzzle_emb_ndim must be at least 1: without an encoder the task is known only by its "
                "puzzle row"
            )
        for name in ("reconstruct", "contrastive"):
            if objective.weight(name) and not encoder:
                raise ValueError(
                    f"objective.{name}_weight={objective.weight(name)} needs demonstrations, which an "
                    "encoder reads"
                )
        if objective.kl_weight and not (encoder and encoder.gives_kl):
            raise ValueError(
                f"objective.kl_weight={objective.kl_weight} weighs nothing: the context is not variational"
            )
        if len(self.data.sides) > 1 and arch.fixes_canvas:
            raise ValueError(
                f"{arch.fixed_by} needs one canvas size; use data.canvas=full, one entry in data.buckets, "
                "or arch.pos_encodings=rope2d"
            )
        if encoder:
            encoder.check(arch, self.data)
        return self

    @property
    def warnings(self) -> list[str]:
        """What a valid run says of itself at its start."""
        found = [self.mode.warning] if self.mode.warning else []
        if self.encoder and self.encoder.gives_kl and not self.objective.kl_weight:
            found.append(
                "objective.kl_weight=0: nothing keeps the latents of the encoder near their prior (the "
                "ancestor: 1e-4)"
            )
        return found

    @property
    def layouts(self) -> tuple[LayoutName, ...]:
        """The dataset layouts that this model trains on: an encoder reads episodes, puzzle rows need
        identifiers."""
        return ("fewshot",) if self.encoder else ("puzzle", "pairs")

    @property
    def name(self) -> str:
        """run_name, or one made of what the run is."""
        encoder = f"-{self.encoder.name}" if self.encoder else ""
        dataset = self.data.path.rstrip("/").rsplit("/", 1)[-1]
        return self.run_name or f"{self.arch.name}{encoder}-{dataset}-seed{self.seed}"
