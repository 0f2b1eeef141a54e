"""A checkpoint opened for evaluation: model, data and limits, as evaluate.py and the experiments that run a model need them."""

import itertools
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SerializeAsAny,
    field_validator,
    model_validator,
)

from dataset.batch import DataConfig
from dataset.store import Store
from dataset.views import EvaluationSet
from evaluation.inference import task_contexts
from evaluation.protocols import ProtocolConfig, adapts, typed_protocol
from evaluation.run import Evaluation, VotingConfig, evaluate, write_files
from models.core import RecursiveModel
from models.losses import ObjectiveConfig
from models.pretrained import load_checkpoint
from utils import checkpoint, distributed
from utils.device import choose_device, describe
from utils.distributed import World
from utils.environment import git_commit
from utils.errors import UserError
from utils.files import read_json, sha256_of
from utils.logging import read_metrics


class EvaluateConfig(VotingConfig):
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

    _typed_protocol = field_validator("protocol", mode="before")(typed_protocol)

    @model_validator(mode="after")
    def _check_predictions(self) -> "EvaluateConfig":
        if self.record_steps and not self.save_predictions:
            raise ValueError("record_steps=true needs save_predictions=true, which keeps what it records")
        if self.save_predictions and self.vote_stop:
            raise ValueError(
                "save_predictions=true keeps every view's answer, and vote_stop=true would leave views out"
            )
        return self


@dataclass
class Session:
    """What one evaluation works with. store: of the evaluated split the tasks that the model may know, where it knows tasks by rows,
    or that training was limited to."""

    config: EvaluateConfig
    world: World
    device: torch.device
    path: Path
    model: RecursiveModel
    info: dict[str, Any]
    data: DataConfig
    store: Store
    trained_pairs: np.ndarray

    @classmethod
    def open(cls, config: EvaluateConfig) -> "Session":
        """Load the checkpoint and its dataset (or `data_path`) and join the other processes. `UserError` if they do not fit."""
        world = World.from_environment()
        device = choose_device(config.device, world)
        distributed.start(world, device, config.timeout_minutes)
        path = checkpoint.resolve(config.checkpoint)
        model, info = load_checkpoint(path, config.weights)
        halting = config.model_dump(include={"halt_max_steps", "halt_threshold"})
        model.config = model.config.model_copy(
            update={name: value for name, value in halting.items() if value != "checkpoint"}
        )
        data = DataConfig(
            **{**info["config"]["data"], **({"path": config.data_path} if config.data_path else {})}
        )
        store = Store.load(data.path, info["data"]["layout"])
        if store.metadata.game != info["data"]["game"]:
            trained = info["data"]["game"]
            raise UserError(
                f"{path} was trained on {trained} and cannot answer {store.path}, which holds {store.metadata.game}"
            )
        if store.layout.shares_rule and data.sides != (store.metadata.max_grid_size,):
            sides = " and ".join(f"{side}x{side}" for side in (data.sides[-1], store.metadata.max_grid_size))
            raise UserError(
                f"{path} was trained on another size of {store.metadata.game} than {store.path} holds: {sides}"
            )
        same_data = store.metadata.content_hash == info["data"]["hash"]
        if store.layout.learns_rows and not same_data:
            if config.protocol.name != "test_time_training":
                raise UserError(
                    f"{path} has one learned row per puzzle of the dataset it was trained on; {store.path} is another dataset, "
                    "whose rows protocol=test_time_training learns"
                )
            model.context.start_anew(store.metadata.num_puzzle_identifiers)
        if same_data:
            store = store.hold_out(info["config"].get("validation"))
        if config.split == "validation" and not len(store.tasks_of("validation")):
            raise UserError(
                f"{path} was trained without validation tasks of {store.path} (validation=N holds them out); choose another split"
            )
        if same_data and config.split == "train":
            store = store.limited("train", data.max_train_groups)
        elif same_data and config.split == "test" and store.layout.learns_rows:
            store = store.limited(
                "test", data.max_eval_groups
            )  # before any choice of subsets: the others' rows have learned nothing
        if not len(store.tasks_of(config.split, config.max_eval_groups, config.subsets)):
            others = sorted(
                {store.subset_names[number] for number in store.task_subset[store.tasks_of(config.split)]}
            )
            what = f"split={config.split}" + (
                "" if config.subsets is None else f" subsets=[{','.join(config.subsets)}]"
            )
            raise UserError(
                f"{store.path} has no task for {what}"
                + (f"; subsets of this split: {', '.join(others)}" if others else "")
            )
        return cls(
            config,
            world,
            device,
            path,
            model.to(device),
            info,
            data,
            store,
            checkpoint.load_trained_pairs(path),
        )

    def questions(self) -> EvaluationSet:
        """The evaluation set without any control."""
        config = self.config
        limit = config.max_eval_groups
        return EvaluationSet(
            self.store, self.data, config.split, config.num_views, config.seed, "none", limit, config.subsets
        )

    def evaluate(self, report: Callable[[int], None] = lambda views: None) -> Evaluation:
        """One evaluation as configured (all processes together)."""
        return evaluate(
            self.model,
            self.store,
            self.data,
            self.config,
            ObjectiveConfig.of_run(self.info["config"]["objective"]),
            self.device,
            self.world,
            seed=self.config.seed,
            trained_pairs=self.trained_pairs,
            protocol=self.config.protocol,
            split=self.config.split,
            subsets=self.config.subsets,
            max_tasks=self.config.max_eval_groups,
            record_steps=self.config.record_steps,
            report=report,
        )

    def write(self, folder: Path, evaluation: Evaluation, seconds: float) -> None:
        """All files of an evaluation, the report with the run's curves and a map of what the model is told of the tasks."""
        config, questions = self.config, evaluation.questions
        # After test-time training the model holds its own weights again, not those that answered.
        with_map = (
            config.report
            and not self.store.layout.shares_rule
            and config.protocol.name != "test_time_training"
        )
        write_files(
            folder,
            evaluation,
            {**self.about(), "num_views": evaluation.num_views, "seconds": round(seconds, 2)},
            with_report=config.report,
            with_predictions=config.save_predictions,
            metrics=read_metrics(self.path.parent.parent / "metrics.jsonl") if config.report else (),
            contexts=task_contexts(
                self.model, questions, self.store.grid_table.to(self.device), config.batch_size
            )
            if with_map
            else None,
        )

    def about(self) -> dict[str, Any]:
        """What a result file says of checkpoint, data, settings and machine."""
        config, info, metadata = self.config, self.info, self.store.metadata
        on_gpu = self.device.type == "cuda"
        return {
            "dataset": {"path": self.data.path, "layout": metadata.layout, "sha256": metadata.content_hash},
            "checkpoint": {
                "path": str(self.path),
                "step": info["step"],
                "weights": config.weights,
                "file": checkpoint.WEIGHTS[config.weights],
                "sha256": sha256_of(self.path / checkpoint.WEIGHTS[config.weights]),
                "git_commit": info["git_commit"],
            },
            "model": {
                "arch": info["config"]["arch"]["name"],
                "encoder": (info["config"]["encoder"] or {}).get("name"),
                "parameters": info["parameters"],
                "halt_max_steps": self.model.config.halt_max_steps,
                "halt_threshold": self.model.config.halt_threshold,
            },
            **config.model_dump(
                include={"split", "subsets", "max_eval_groups", "num_views", "batch_size", "seed"}
            ),
            **config.model_dump(include={"ranking", "vote_stop", "record_steps"}),
            "adaptation": config.protocol.model_dump(),
            "git_commit": git_commit(),
            "torch": torch.__version__,
            "device": describe(self.device),
            "processes": self.world.size,
            "peak_gpu_memory_bytes": torch.cuda.max_memory_allocated(self.device) if on_gpu else None,
            "settings": self._settings(),
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        }

    def folder(self) -> Path:
        """The named output folder, or one inside the run folder, named after checkpoint, split and protocol.

        Where the latter holds an evaluation with other settings, a number is added: only the same evaluation is replaced.
        """
        config = self.config
        if config.output_dir:
            return Path(config.output_dir)
        other_data = f"-{Path(self.data.path).name}" if config.data_path else ""
        how = f"-{config.protocol.name}" if adapts(config.protocol) else ""
        name = f"step_{self.info['step']}-{config.weights}-{config.split}{other_data}{how}"
        evaluations = self.path.parent.parent / "evaluations"
        numbered = (
            evaluations / (f"{name}-{number}" if number > 1 else name) for number in itertools.count(1)
        )
        return next(folder for folder in numbered if self._may_replace(folder))

    def _may_replace(self, folder: Path) -> bool:
        results = folder / "results.json"
        return not results.is_file() or read_json(results).get("settings") == self._settings()

    def _settings(self) -> dict[str, Any]:
        """The options that decide an evaluation's scores."""
        elsewhere = {
            "checkpoint",
            "output_dir",
            "device",
            "batch_size",
            "timeout_minutes",
            "report",
            "save_predictions",
        }
        return self.config.model_dump(mode="json", exclude=elsewhere)
