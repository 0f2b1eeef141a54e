"""A training run that is evaluated on its way: scores and pictures of the averaged weights."""

import math
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from pydantic import PositiveInt, model_validator

from dataset.store import Store
from evaluation import pictures
from evaluation.progress import Progress
from evaluation.respondent import Respondent
from evaluation.run import Ask, Split, evaluate
from evaluation.scoreboard import HEADLINES, metric_names
from evaluation.voting import VotingConfig
from training.config import TrainingConfig
from training.meter import Meter
from training.start import Run
from training.state import TrainState
from utils import checkpoint, distributed
from utils.device import explains_out_of_memory
from utils.errors import UserError, nearest
from utils.logging import LoggingConfig, RunLogger


class MonitoredConfig(TrainingConfig):
    """A run with evaluations.

    eval_tasks: the first so many test tasks only.
    best_metric: what checkpoints are chosen by, on the validation tasks.
    """

    eval_tasks: PositiveInt | None
    best_metric: str
    evaluation: VotingConfig
    logging: LoggingConfig

    @model_validator(mode="after")
    def _check_evaluation(self) -> "MonitoredConfig":
        if self.validation and self.eval_tasks:
            raise ValueError(
                f"eval_tasks={self.eval_tasks} limits the test tasks, "
                f"but validation={self.validation} evaluates others"
            )
        if self.evaluation.ranking == "agreement" and not self.encoder:
            raise ValueError(
                "evaluation.ranking=agreement asks the demonstrations, "
                "which only a model with an encoder reads"
            )
        return self

    @property
    def evaluated_split(self) -> Split:
        """The split that is evaluated during training."""
        return "validation" if self.validation else "test"


def check_best_metric(config: MonitoredConfig, store: Store) -> None:
    """Raise `UserError` if the validation tasks could not be scored by `best_metric`.

    It is asked before the training, not after it.
    """
    names, wanted = metric_names(config.evaluation, store), config.best_metric
    if config.validation and wanted not in names:
        raise UserError(
            f"best_metric={wanted}{nearest(wanted, names)} is not evaluated; there are {', '.join(names)}"
        )


def respondent_of(run: Run[MonitoredConfig]) -> Respondent:
    """The run's model as an evaluation asks it, with the weights that it has at that moment."""
    config, state = run.config, run.state
    return Respondent(
        model=state.model,
        store=run.store,
        table=run.table,
        data=config.data,
        objective=config.objective,
        trained_pairs=state.trained_pairs,
        world=run.world,
    )


def log_evaluation(run: Run[MonitoredConfig], logger: RunLogger, meter: Meter, saved: Path) -> None:
    """Score the validation tasks, or the evaluation tasks where none are held out, with the averaged weights.

    The result is logged, and noted in the checkpoint `saved` of this step. Only validation scores choose
    among checkpoints, by `best_metric`.
    """
    config, state = run.config, run.state
    split = config.evaluated_split
    limits = [] if config.validation else [config.eval_tasks, config.data.max_eval_groups]
    max_tasks = min((limit for limit in limits if limit is not None), default=None)
    ask = Ask(config.seed, split, max_tasks=max_tasks, keep_predictions=False)
    progress = Progress()
    started = time.perf_counter()
    with averaged_weights(state), less_memory_to_answer("the evaluation", run):
        result = evaluate(respondent_of(run), config.evaluation, ask, progress=progress)
    seconds, asked = time.perf_counter() - started, sum(distributed.gather_objects(progress.views))
    metrics, prefix = result.metrics(), "validation/" if config.validation else ""
    # A value that is no number is logged, but it is no score: it would win or lose every comparison.
    score = metrics.get(config.best_metric) if config.validation else None
    score = score if score is not None and math.isfinite(score) else None
    if score is not None:
        state.scores[state.step] = score
    values = {
        "protocol": result.protocol,
        **{f"{prefix or 'eval/'}{name}": n for name, n in result.counts.items()},
    }
    named = {prefix + name: value for name, value in metrics.items()}
    logger.log(state.step, {**named, **values, **meter.evaluated(asked, seconds)})
    if run.world.is_main:
        checkpoint.record_evaluation(saved, {"split": split, "protocol": result.protocol, **metrics}, score)
    shown_scores = (*HEADLINES, *(f"all.{name}" for name in run.store.checks))
    shown = (s for s in result.scores if s.metric in shown_scores and s.control == "none")
    words = ", ".join(f"{s.metric} {s.value:.3f} [{s.ci_low:.3f}, {s.ci_high:.3f}]" for s in shown)
    trained_on = run.info["data"].get("trained_on")
    asked_of = f"{result.counts['tasks']} tasks" + (f", trained on {trained_on}" if trained_on else "")
    logger.say(f"step {state.step}: {split}, {result.protocol}, {asked_of}: {words}")
    for note in result.notes:
        logger.note(f"evaluation: {note}")


def log_pictures(run: Run[MonitoredConfig], logger: RunLogger) -> None:
    """Draw what the averaged weights answer to a few training and evaluation tasks (the ancestors' names)."""
    config = run.config
    look = run.store.game.drawing(run.store.metadata.max_grid_size)
    drawn: dict[str, Split] = {"train_predictions": "train", "eval_predictions": "test"}
    for name, split in drawn.items():
        with averaged_weights(run.state), less_memory_to_answer("the pictures", run):
            answered = pictures.predictions(
                respondent_of(run), split, config.logging.images_samples, config.evaluation.batch_size
            )
        if answered:
            logger.image(
                run.state.step,
                name,
                pictures.draw(answered, look),
            )


def less_memory_to_answer(what: str, run: Run[MonitoredConfig]) -> AbstractContextManager:
    """Inside the context a lack of memory is explained."""
    remedy = f"lower evaluation.batch_size={run.config.evaluation.batch_size}"
    return explains_out_of_memory(f"{what} at step {run.state.step}", remedy)


def best_line(run: Run[MonitoredConfig]) -> list[str]:
    """The best validation score of the run and its step, in words, where there is one."""
    config, state = run.config, run.state
    best = state.best_step
    if best is None:
        return []
    why = " (no better one for longer than patience)" if state.step < config.train_steps else ""
    return [
        f"best {config.best_metric} on the validation tasks: {state.scores[best]:.3f} at step {best}{why}"
    ]


def averaged_weights(state: TrainState) -> AbstractContextManager:
    """Inside the context the model has the averaged weights, if the run keeps any."""
    return state.ema.swapped_in() if state.ema else nullcontext()
