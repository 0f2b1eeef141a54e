"""Train a TRM or an ETRM: python pretrain_etrm.py [key=value ...], or torchrun --nproc-per-node N pretrain_etrm.py ...

Config -> device -> data -> model -> optimisers -> resume -> loop (step, log, save, evaluate) -> close.
`--cfg job` prints the resolved configuration.
"""

import math
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf

from config.compose import launch
from config.schema import PretrainConfig
from dataset import store as datasets
from dataset.batch import Samples, materialise
from dataset.canvas import GridTable
from dataset.samplers import SAMPLERS, Sampler
from dataset.store import Store
from evaluation import pictures
from evaluation.evaluate import evaluate, metric_names
from evaluation.report import read_metrics, training_curves
from models.core import DataSizes
from models.layers import compile_fused
from models.pretrained import load_decoder, pairs_behind
from models.trm import build_model, count_parameters
from training.diagnostics import context_diagnostics
from training.ema import EMA
from training.meter import Meter
from training.nonfinite import dump_batch
from training.optim import build_optimizers
from training.state import TrainState
from training.step import StepSettings, train_step
from utils import checkpoint, distributed
from utils.device import choose_device, describe, explains_out_of_memory, should_compile
from utils.distributed import World
from utils.environment import append_start, environment, peak_memory_gb
from utils.errors import Stopped, UserError, nearest, reports_user_errors
from utils.files import write_atomically, write_json
from utils.images import write_curves
from utils.logging import RunLogger
from utils.signals import StopRequest

# What a resumed run may do differently: how long, how often and where to, but not what is trained on what.
RESUMABLE_DIFFERENCES = {
    *("train_steps", "max_seconds", "log_interval", "eval_interval", "eval_tasks", "patience", "max_nonfinite_steps", "micro_batch_size"),
    *("checkpoint_interval", "checkpoint_minutes", "keep_checkpoints", "keep_best_checkpoints"),
    *("resume", "timeout_minutes", "logging", "evaluation", "device", "compile", "output_dir", "run_name", "project_name"),
}

LESS_MEMORY = (
    "lower global_batch_size (python -m experiments.find_batch_size with the same options finds the largest that fits), or "
    "data.buckets, data.max_demos or arch.hidden_size, or spread the batch over more processes"
)
SHOWN_SCORES = ("ARC/pass@1", "ARC/pass@2", "all.exact_accuracy", "all.accuracy")


@distributed.reports_lost_peers()
def train(config: PretrainConfig) -> None:
    """One training run from its configuration to its last checkpoint."""
    world = World.from_environment()
    device = choose_device(config.device, world)
    compile_fused(should_compile(config.compile, device, config.train_steps))
    distributed.start(world, device, config.timeout_minutes)
    folder = Path(config.output_dir) / config.name

    store = open_store(config)
    sampler = SAMPLERS[store.metadata.layout](store, config.data, config.seed, config.global_batch_size, world.rank, world.size)

    torch.manual_seed(config.seed)
    model = build_model(config.arch, DataSizes.of(store, config.data), config.encoder).to(device)
    optimizers, optimizer_name = build_optimizers(model, config, device)
    state = TrainState(model, optimizers, EMA(model, config.ema_rate) if config.ema else None, sampler.trained_pairs)
    resume(state, config, store, folder, world, device)
    decoder_report = None if state.step else start_from_pretrained(state, config, store, folder, world)

    settings = StepSettings.of(config, world)
    info = {
        "config": config.model_dump(),
        "sizes": vars(DataSizes.of(store, config.data)),
        "data": {
            "path": config.data.path,
            "layout": store.metadata.layout,
            "game": store.metadata.game,
            "protocol": store.metadata.protocol,
            "hash": store.metadata.content_hash,
        },
        "parameters": count_parameters(model),
        "optimizer": optimizer_name,
        "git_commit": checkpoint.git_commit(),
        "torch": torch.__version__,
        "device": describe(device),
    }
    if world.is_main:
        write_atomically(folder / "config.yaml", lambda path: OmegaConf.save(config.model_dump(), path))
        about = {name: value for name, value in info.items() if name != "config"}
        append_start(folder / "environment.json", {"step": state.step, **about, **environment(device, world)})
    logger = RunLogger(config.logging, folder, config.project_name, config.name, info, world, config.train_steps, state.step)
    logger.say(f"{folder}: {model_line(info)}; {optimizer_name}; {describe(device)}, {world.size} process(es)")
    logger.say(f"data: {config.data.path} ({store.metadata.protocol}), {data_line(sampler)}")
    for warning in config.warnings:
        logger.say(f"warning: {warning}")
    if state.step:
        logger.say(f"resumed at step {state.step}")
    if decoder_report:
        logger.say(decoder_report)

    try:
        stopped_by = loop(state, config, settings, store, sampler, logger, device, info)
    finally:
        logger.close()
    if world.is_main:
        write_curves(folder / "curves.png", training_curves(read_metrics(folder / "metrics.jsonl")))
    distributed.barrier()  # torchrun ends all as soon as one has ended as stopped, also one that still draws
    distributed.close()
    where = f"step {state.step}: checkpoint {folder}/checkpoints/step_{state.step}"
    if stopped_by:
        raise Stopped(f"stopped by {stopped_by} at {where}; the same command continues it")
    if world.is_main:
        print(where)
        if state.scores:
            best = state.best_step
            why = " (no better one for longer than patience)" if state.step < config.train_steps else ""
            print(f"best {config.best_metric} on the validation tasks: {state.scores[best]:.3f} at step {best}{why}")


def loop(
    state: TrainState,
    config: PretrainConfig,
    settings: StepSettings,
    store: Store,
    sampler: Sampler,
    logger: RunLogger,
    device: torch.device,
    info: dict,
) -> str | None:
    """Step, log, save, evaluate, until train_steps, max_seconds or the end of patience, or until a signal asks to stop, whose
    name is returned. An evaluation follows its checkpoint, which it therefore cannot lose."""
    table, folder, world = store.grid_table.to(device), Path(config.output_dir) / config.name, settings.world
    meter, started, skipped_in_a_row, saved = Meter(), time.monotonic(), 0, state.step
    stride = config.mode.updates  # an interval ends within the last `stride` updates
    saved_at = started

    def save() -> None:
        nonlocal saved, saved_at
        if saved != state.step or not state.step:
            state.save(folder / "checkpoints", world, info, config.keep_checkpoints, config.keep_best_checkpoints)
            saved, saved_at = state.step, time.monotonic()

    def evaluation_due() -> bool:
        return bool(config.eval_interval) and (state.step % config.eval_interval < stride or state.step == config.train_steps)

    def evaluate_checkpoint() -> None:
        log_evaluation(logger, state, store, config, device, world, folder / "checkpoints" / f"step_{state.step}", meter)

    if not config.train_steps:
        save()
    (unfinished,) = distributed.any_true(world.is_main and checkpoint.lacks_evaluation(folder / "checkpoints" / f"step_{state.step}"))
    with StopRequest() as stop:
        if unfinished and evaluation_due():
            with meter.paused():
                evaluate_checkpoint()  # a run that was killed during an evaluation makes up for it
        while state.step < config.train_steps and not state.out_of_patience(config.patience):
            samples = sampler.sample(state.step)
            with explains_out_of_memory(f"training step {state.step + 1}, {batch_line(config, samples, world)}", LESS_MEMORY):
                result = train_step(state, materialise(samples, store, table), settings)
            meter.add(result, config.global_batch_size)
            skipped_in_a_row = 0 if result.updated else skipped_in_a_row + 1
            if not result.updated:
                dumped = dump_batch(folder, state.step - result.steps, samples, result, store, world)
            if skipped_in_a_row >= config.max_nonfinite_steps:
                raise UserError(
                    f"step {state.step}: the gradient was not finite {skipped_in_a_row} times in a row; last checkpoint: step {saved}; "
                    f"the batches are in {dumped.parent}"
                )
            now = time.monotonic()
            stopping, out_of_time, overdue = distributed.any_true(
                stop.signal is not None,
                config.max_seconds is not None and now - started > config.max_seconds,
                config.checkpoint_minutes is not None and now - saved_at > 60 * config.checkpoint_minutes,
            )
            last = stopping or out_of_time or state.step == config.train_steps
            if state.step % config.log_interval < stride or last:
                values = meter.read()
                with meter.paused(), explains_out_of_memory(f"what is measured at step {state.step}", LESS_MEMORY):
                    values["timing/peak_memory_gb"] = peak_memory_gb(device)
                    values |= context_diagnostics(state.model, samples, store, table, config.seed, state.step, world)
                    log(logger, state.step, values, state.optimizers)
            with meter.paused():
                if state.step % config.checkpoint_interval < stride or overdue or last or evaluation_due():
                    save()
                if evaluation_due() and not stopping:
                    evaluate_checkpoint()
                if config.logging.images_interval and (state.step % config.logging.images_interval < stride or last) and not stopping:
                    log_pictures(logger, state, store, config, table, world)
            if stopping:
                return stop.signal or "a signal to another process"
            if out_of_time:
                break
    return None


def open_store(config: PretrainConfig) -> Store:
    """The dataset, with the validation tasks held out. `UserError` if these could not be scored by `best_metric`."""
    store = datasets.load(config.data.path, *config.layouts).hold_out(config.validation)
    names, wanted = metric_names(config.evaluation, store.metadata.layout), config.best_metric
    if config.validation and wanted not in names:
        raise UserError(f"best_metric={wanted}{nearest(wanted, names)} is not evaluated; there are {', '.join(names)}")
    return store


def resume(state: TrainState, config: PretrainConfig, store: Store, folder: Path, world: World, device: torch.device) -> None:
    """Continue this run's newest checkpoint (auto), a named one, or refuse to overwrite an earlier run (never).

    Processes that torchrun restarts continue what they have saved, whatever the run began with.
    """
    existing = distributed.gather_objects(checkpoint.latest(folder / "checkpoints"))[0]  # all continue what the first process sees
    how = "auto" if existing and world.restarts else config.resume
    if how == "never":
        if existing:
            raise UserError(f"{folder} already holds checkpoints and resume=never would overwrite them; choose another run_name")
        return
    path = existing if how == "auto" else checkpoint.resolve(how)
    if path is None:
        return
    if existing and path.resolve() != existing.resolve():
        raise UserError(f"{folder} holds {existing.name}, which continuing from {path} would overwrite; choose another run_name")
    info = checkpoint.load_info(path)
    ours, theirs = flatten(config.model_dump()), flatten(info["config"])
    different = [key for key in sorted(ours.keys() | theirs.keys()) if ours.get(key) != theirs.get(key)]
    different = [key for key in different if key.split(".")[0] not in RESUMABLE_DIFFERENCES and key != "data.path"]
    if different:
        shown = ", ".join(f"{key}: {theirs.get(key)} then, {ours.get(key)} now" for key in different[:5])
        raise UserError(f"{path} belongs to a run with another configuration ({shown}); choose another run_name to start a new run")
    if info["data"]["hash"] != store.metadata.content_hash:
        raise UserError(f"{path} was trained on other data than {store.path} holds now; rebuild that dataset or start a new run")
    state.load(path, world, device)


def start_from_pretrained(state: TrainState, config: PretrainConfig, store: Store, folder: Path, world: World) -> str | None:
    """Load `load_pretrained_decoder`, if any, into a new run; every weight's fate is written to pretrained_decoder.json."""
    if config.load_pretrained_decoder is None:
        return None
    report = load_decoder(state.model, config, store.identifiers)
    state.trained_pairs = np.union1d(state.trained_pairs, pairs_behind(Path(config.load_pretrained_decoder)))
    if state.ema:
        state.ema.load(dict(state.model.named_parameters()))
    if world.is_main:
        write_json(folder / "pretrained_decoder.json", vars(report), indent=1)
    return report.summary()


def flatten(values: dict, prefix: str = "") -> dict:
    """Nested keys joined by dots."""
    flat = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def batch_line(config: PretrainConfig, samples: Samples, world: World) -> str:
    """What a step had to hold in memory."""
    demonstrations = f", {samples.cell.demos} demonstrations" if samples.cell.demos else ""
    return f"global_batch_size={config.global_batch_size} over {world.size} process(es), canvas side {samples.cell.side}{demonstrations}"


def log(logger: RunLogger, step: int, values: dict, optimizers: list) -> None:
    """A line in metrics.jsonl and beside the progress bar."""
    logger.log(step, {**values, "train/lr": optimizers[0].param_groups[0]["lr"]})
    shown = {"loss": "train/lm_loss", "acc": "train/accuracy", "exact": "train/exact_accuracy"}
    texts = {short: f"{values[name]:.3f}" for short, name in shown.items() if values.get(name) is not None}
    logger.progress(step, {**texts, "samples/s": f"{values['timing/train_samples_per_second']:.0f}"})


def log_evaluation(
    logger: RunLogger,
    state: TrainState,
    store: Store,
    config: PretrainConfig,
    device: torch.device,
    world: World,
    saved: Path,
    meter: Meter,
) -> None:
    """Score the validation tasks, or the evaluation tasks where none are held out, with the averaged weights.

    What is found is logged and noted in the checkpoint `saved` of this step. Only validation scores choose anything.
    """
    split, limits = ("validation", []) if config.validation else ("test", [config.eval_tasks, config.data.max_eval_groups])
    views, started = [], time.perf_counter()
    with averaged_weights(state), less_memory_to_answer("the evaluation", state, config):
        result = evaluate(
            state.model,
            store,
            config.data,
            config.evaluation,
            config.objective,
            device,
            world,
            seed=config.seed,
            trained_pairs=state.trained_pairs,
            split=split,
            max_tasks=min((limit for limit in limits if limit is not None), default=None),
            report=views.append,
        )
    seconds, asked = time.perf_counter() - started, sum(distributed.gather_objects(sum(views)))
    metrics, prefix = result.metrics(), "validation/" if config.validation else ""
    score = metrics.get(config.best_metric) if config.validation else None
    score = score if score is not None and math.isfinite(score) else None
    if score is not None:
        state.scores[state.step] = score
    values = {"protocol": result.protocol, **{f"{prefix or 'eval/'}{name}": n for name, n in result.counts.items()}}
    named = {prefix + name: value for name, value in metrics.items()}
    logger.log(state.step, {**named, **values, **meter.evaluated(asked, seconds)})
    if world.is_main:
        checkpoint.record_evaluation(saved, {"split": split, "protocol": result.protocol, **metrics}, score)
    shown = (s for s in result.scores if s.metric in SHOWN_SCORES and s.control == "none")
    values = ", ".join(f"{s.metric} {s.value:.3f} [{s.ci_low:.3f}, {s.ci_high:.3f}]" for s in shown)
    logger.say(f"step {state.step}: {split}, {result.protocol}, {result.counts['tasks']} tasks: {values}")
    for note in result.notes:
        logger.note(f"evaluation: {note}")


def log_pictures(logger: RunLogger, state: TrainState, store: Store, config: PretrainConfig, table: GridTable, world: World) -> None:
    """Draw what the averaged weights answer to a few training and evaluation tasks, under the ancestors' names."""
    for name, split in (("train_predictions", "train"), ("eval_predictions", "test")):
        with averaged_weights(state), less_memory_to_answer("the pictures", state, config):
            shown = pictures.predictions(
                state.model,
                store,
                config.data,
                table,
                world,
                split=split,
                tasks=config.logging.images_samples,
                batch_size=config.evaluation.batch_size,
            )
        if shown:
            logger.image(state.step, name, pictures.draw(shown))


def less_memory_to_answer(what: str, state: TrainState, config: PretrainConfig) -> AbstractContextManager:
    """Inside the context a lack of memory is explained."""
    return explains_out_of_memory(f"{what} at step {state.step}", f"lower evaluation.batch_size={config.evaluation.batch_size}")


def averaged_weights(state: TrainState) -> AbstractContextManager:
    """Inside the context the model has the averaged weights, if the run keeps any."""
    return state.ema.swapped_in() if state.ema else nullcontext()


def model_line(info: dict) -> str:
    """What is trained, and how large it is."""
    config, parameters = info["config"], info["parameters"]
    encoder = f", encoder {config['encoder']['name']} {parameters['context']:,}" if config["encoder"] else ""
    rows = f", puzzle table {parameters['puzzle_table']:,}" if parameters["puzzle_table"] else ""
    return f"{config['arch']['name']}: core {parameters['core']:,} parameters{encoder}{rows}"


def data_line(sampler: Sampler) -> str:
    """How many tasks train on which canvases."""
    tasks = len({task for choice in sampler.choices.values() for task in choice.tasks.tolist()})
    sides = sorted({cell.side for cell in sampler.cells})
    skipped = f"; {len(sampler.skipped_tasks)} tasks do not fit the canvas or the demonstration limits" if sampler.skipped_tasks else ""
    held_out = len(sampler.store.tasks_of("validation"))
    validation = f", {held_out} held out for validation" if held_out else ""
    return f"{tasks} training tasks on canvases {sides}{validation}{skipped}"


@reports_user_errors
def main() -> None:
    launch("pretrain", PretrainConfig, train)


if __name__ == "__main__":
    main()
