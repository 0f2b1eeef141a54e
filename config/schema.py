"""A training run as a whole (config/pretrain.yaml), which holds the values.

Its parts stand beside their readers: `StepConfig` (training/step.py), `TrainingConfig` (training/config.py)
and `MonitoredConfig` (evaluation/in_training.py), each with the rules that concern it. Here is what the loop
reads.
"""

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from evaluation.in_training import MonitoredConfig


class PretrainConfig(MonitoredConfig):
    """When the loop of pretrain_etrm.py logs, saves, evaluates and stops. Intervals count steps."""

    project_name: str
    max_seconds: PositiveFloat | None
    log_interval: PositiveInt
    eval_interval: PositiveInt | None
    patience: PositiveInt | None
    min_delta: NonNegativeFloat
    checkpoint_interval: PositiveInt
    checkpoint_minutes: PositiveFloat | None
    keep_checkpoints: PositiveInt
    keep_best_checkpoints: NonNegativeInt
    max_nonfinite_steps: PositiveInt

    @model_validator(mode="after")
    def _check_choice(self) -> "PretrainConfig":
        for name in ("patience", "keep_best_checkpoints"):
            if getattr(self, name) and not (self.validation and self.eval_interval):
                raise ValueError(
                    f"{name} needs validation and eval_interval: what chooses by the test tasks' scores "
                    "has seen them"
                )
        return self
