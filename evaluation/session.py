"""A checkpoint opened for an evaluation, for evaluate.py and the experiments that run a model."""

import itertools
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from dataset.store import Store
from dataset.views import EvaluationSet
from evaluation.folder import RESULTS, write_files
from evaluation.inference import task_contexts
from evaluation.progress import Progress
from evaluation.protocols import ProtocolConfig, adaptation_class, row_learners
from evaluation.respondent import Respondent
from evaluation.run import Ask, Evaluation, Split, evaluate
from evaluation.thinking import ThinkingConfig
from evaluation.trained_model import AskedDtype, TrainedModel
from evaluation.voting import VotingConfig
from models.context import PuzzleEmbedding
from models.trial import settle_threads
from utils import checkpoint, distributed
from utils.device import choose_device, describe
from utils.distributed import World
from utils.environment import git_commit
from utils.errors import UserError
from utils.files import read_json, sha256_of
from utils.logging import read_metrics

# What decides where an evaluation runs and what it keeps, but none of its scores.
NOT_SETTINGS = {
    "checkpoint",
    "output_dir",
    "device",
    "threads",
    "batch_size",
    "timeout_minutes",
    "report",
    "save_predictions",
}


class EvaluateConfig(VotingConfig, ThinkingConfig):
    """One evaluation of a checkpoint (config/evaluate.yaml).

    depth_curve: score the answers after every ACT step, too.
    save_predictions, record_steps: keep every view's answer, and those after every ACT step.
    """

    checkpoint: str
    weights: Literal["ema", "raw"]
    protocol: ProtocolConfig
    data_path: str | None
    split: Split
    subsets: list[str] | None
    max_eval_groups: PositiveInt | None
    seed: NonNegativeInt
    device: Literal["auto", "cpu", "cuda"]
    threads: Literal["auto"] | PositiveInt
    forward_dtype: AskedDtype
    timeout_minutes: PositiveFloat
    output_dir: str | None
    report: bool
    depth_curve: bool
    save_predictions: bool
    record_steps: bool

    @model_validator(mode="after")
    def _check_predictions(self) -> "EvaluateConfig":
        if self.record_steps and not self.save_predictions:
            raise ValueError("record_steps=true needs save_predictions=true, which keeps what it records")
        if self.save_predictions and self.vote_stop:
            raise ValueError(
                "save_predictions=true keeps every view's answer, and vote_stop=true would leave views out"
            )
        if self.depth_curve and self.vote_stop:
            raise ValueError(
                "depth_curve=true votes after every step, and vote_stop=true would leave views out"
            )
        return self

    @property
    def ask(self) -> Ask:
        """What is asked of the model."""
        return Ask(
            self.seed,
            self.split,
            self.subsets,
            self.max_eval_groups,
            self.protocol,
            keep_predictions=self.save_predictions,
            record_steps=self.record_steps,
            depth_curve=self.depth_curve,
            thinking=self,
        )


@dataclass
class Session:
    """What one evaluation works with: settings, checkpoint, and the model with the tasks that it may know.

    notes: how it computes, where that is worth a word.
    """

    config: EvaluateConfig
    trained: TrainedModel
    respondent: Respondent
    notes: tuple[str, ...] = ()

    @classmethod
    def open(cls, config: EvaluateConfig) -> "Session":
        """Load the checkpoint and its dataset (or `data_path`), and join the other processes.

        Raises `UserError` if they do not fit, or if there is no task to ask.
        """
        world = World.from_environment()
        device = choose_device(config.device, world)
        distributed.start(world, device, config.timeout_minutes)
        trained = TrainedModel.load(config.checkpoint, config.weights, device, config.forward_dtype)
        model = trained.model
        model.config = config.deepened(model.config)
        data = trained.data(config.data_path)
        store = Store.load(data.path, trained.layout.name)
        _check_game(trained, store, data.sides)
        if store.layout.learns_rows and store.metadata.content_hash != trained.data_hash:
            _forget_rows(trained, store, config)
        store = _tasks_to_ask(trained, store, config)
        model.to(device)
        threads = settle_threads(config.threads, model, data, config.batch_size)
        return cls(
            config,
            trained,
            Respondent(
                model=model,
                store=store,
                table=store.grid_table.to(device),
                data=data,
                objective=trained.objective,
                trained_pairs=trained.trained_pairs,
                world=world,
            ),
            tuple(note for note in (trained.slow_on(device), threads) if note),
        )

    def questions(self) -> EvaluationSet:
        """The evaluation set without any control."""
        return self.config.ask.questions(self.respondent, self.config.num_views)

    def evaluate(self, progress: Progress | None = None) -> Evaluation:
        """One evaluation as configured (all processes together)."""
        return evaluate(self.respondent, self.config, self.config.ask, progress)

    def write(self, folder: Path, evaluation: Evaluation, seconds: float) -> None:
        """All files of an evaluation that took `seconds`.

        The report has the run's training curves, and a map of what the model is told of the tasks.
        """
        config, respondent = self.config, self.respondent
        about = {**self.about(), "num_views": evaluation.num_views, "seconds": round(seconds, 2)}
        # A map drawn from other weights than those that answered would show another model.
        with_map = (
            config.report
            and not respondent.store.layout.shares_rule
            and adaptation_class(config.protocol).leaves_weights
        )
        contexts = task_contexts(respondent, evaluation.questions, config.batch_size) if with_map else None
        if contexts and not np.isfinite(list(contexts.values())).all():
            contexts = None
            evaluation.notes.append(
                "the report has no map of the tasks: the model's contexts hold numbers that are not finite"
            )
        write_files(
            folder,
            evaluation,
            about,
            with_report=config.report,
            with_predictions=config.save_predictions,
            metrics=read_metrics(self.trained.run_folder / "metrics.jsonl") if config.report else (),
            contexts=contexts,
        )

    def about(self) -> dict[str, Any]:
        """What a result file says of checkpoint, data, settings and machine."""
        config, trained, respondent = self.config, self.trained, self.respondent
        metadata, device = respondent.store.metadata, respondent.device
        weights = checkpoint.WEIGHTS[trained.weights]
        on_gpu = device.type == "cuda"
        return {
            "dataset": {
                "path": respondent.data.path,
                "layout": metadata.layout,
                "sha256": metadata.content_hash,
            },
            "checkpoint": {
                "path": str(trained.path),
                "step": trained.step,
                "weights": trained.weights,
                "file": weights,
                "sha256": sha256_of(trained.path / weights),
                "git_commit": trained.git_commit,
            },
            **({"trained_on": self.trained_on} if self.trained_on else {}),
            "model": {
                "arch": trained.arch,
                "encoder": trained.encoder,
                "parameters": trained.parameters,
                "forward_dtype": trained.model.config.forward_dtype,
                "halt_max_steps": trained.model.config.halt_max_steps,
                "halt_threshold": trained.model.config.halt_threshold,
            },
            **config.model_dump(
                include={"split", "subsets", "max_eval_groups", "num_views", "batch_size", "seed"}
            ),
            **config.model_dump(include={"ranking", "vote_stop", "record_steps"}),
            **config.model_dump(include={"rollouts", "sigma", "random_init", "select"}),
            "adaptation": config.protocol.model_dump(),
            "git_commit": git_commit(),
            "torch": torch.__version__,
            "device": describe(device),
            "processes": respondent.world.size,
            "peak_gpu_memory_bytes": torch.cuda.max_memory_allocated(device) if on_gpu else None,
            "settings": self._settings(),
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        }

    @property
    def trained_on(self) -> str | None:
        """What a game's model was trained on, in words, as far as it is known."""
        trained, store = self.trained, self.respondent.store
        if trained.trained_on or store.metadata.content_hash != trained.data_hash:
            return trained.trained_on
        data = trained.data()
        return store.trained_on(data.augmentation, data.max_train_groups)

    def folder(self) -> Path:
        """The named output folder, or one of the model's, named after checkpoint, split and protocol.

        A number is added where that one holds an evaluation with other settings, which is not replaced.
        """
        config, trained = self.config, self.trained
        if config.output_dir:
            return Path(config.output_dir)
        other_data = f"-{Path(config.data_path).name}" if config.data_path else ""
        how = f"-{config.protocol.name}" if adaptation_class(config.protocol).adapts else ""
        name = f"step_{trained.step}-{config.weights}-{config.split}{other_data}{how}"
        numbered = (
            trained.evaluations / (f"{name}-{number}" if number > 1 else name)
            for number in itertools.count(1)
        )
        return next(folder for folder in numbered if self._may_replace(folder))

    def _may_replace(self, folder: Path) -> bool:
        results = folder / RESULTS
        return not results.is_file() or read_json(results).get("settings") == self._settings()

    def _settings(self) -> dict[str, Any]:
        """The options that decide an evaluation's scores."""
        return self.config.model_dump(mode="json", exclude=NOT_SETTINGS)


def _check_game(trained: TrainedModel, store: Store, sides: tuple[int, ...]) -> None:
    """Raise `UserError` unless the model was trained on this game, and on this size where it has one."""
    metadata = store.metadata
    if metadata.game != trained.game:
        raise UserError(
            f"{trained.path} was trained on {trained.game} and cannot answer {store.path}, "
            f"which holds {metadata.game}"
        )
    if store.layout.shares_rule and sides != (metadata.max_grid_size,):
        found = " and ".join(f"{side}x{side}" for side in (sides[-1], metadata.max_grid_size))
        raise UserError(
            f"{trained.path} was trained on another size of {metadata.game} than {store.path} holds: {found}"
        )


def _forget_rows(trained: TrainedModel, store: Store, config: EvaluateConfig) -> None:
    """Give a model with puzzle rows fresh ones for another dataset, if the protocol learns them."""
    if not adaptation_class(config.protocol).learns_rows:
        raise UserError(
            f"{trained.path} has one learned row per puzzle of the dataset it was trained on; "
            f"{store.path} is another dataset, whose rows {row_learners()} learns"
        )
    cast(PuzzleEmbedding, trained.model.context).start_anew(store.metadata.num_puzzle_identifiers)


def _tasks_to_ask(trained: TrainedModel, store: Store, config: EvaluateConfig) -> Store:
    """The dataset with the tasks of the split that the model may be asked, at least one."""
    same_data = store.metadata.content_hash == trained.data_hash
    if same_data:
        store = store.hold_out(trained.validation)
    if config.split == "validation" and not len(store.tasks_of("validation")):
        raise UserError(
            f"{trained.path} was trained without validation tasks of {store.path} "
            "(validation=N holds them out); choose another split"
        )
    limits = trained.data()
    if same_data and config.split == "train":
        store = store.limited("train", limits.max_train_groups)
    elif same_data and config.split == "test" and store.layout.learns_rows:
        # Before any choice of subsets: the rows of the others have learned nothing.
        store = store.limited("test", limits.max_eval_groups)
    if not len(store.tasks_of(config.split, config.max_eval_groups, config.subsets)):
        raise UserError(_no_task(store, config))
    return store


def _no_task(store: Store, config: EvaluateConfig) -> str:
    """That there is nothing to ask, and which subsets there are."""
    of_split = store.task_subset[store.tasks_of(config.split)]
    others = ", ".join(sorted({store.subset_names[number] for number in of_split}))
    what = f"split={config.split}"
    if config.subsets is not None:
        what += f" subsets=[{','.join(config.subsets)}]"
    return f"{store.path} has no task for {what}" + (f"; subsets of this split: {others}" if others else "")
