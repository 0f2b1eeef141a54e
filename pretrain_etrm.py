"""Train a TRM or an ETRM: python pretrain_etrm.py [key=value ...], or torchrun --nproc-per-node N pretrain_etrm.py ...

Config -> device -> data -> model -> optimisers -> resume -> loop (step, log, evaluate, save) -> close.
`--cfg job` prints the resolved configuration.
"""

import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from omegaconf import OmegaConf

from config.compose import launch
from config.schema import PretrainConfig
from dataset import store as datasets
from dataset.batch import materialise
from dataset.canvas import GridTable
from dataset.samplers import SAMPLERS, Sampler
from dataset.store import Store
from evaluation import pictures
from evaluation.evaluate import evaluate
from models.pretrained import load_decoder
from models.trm import DataSizes, build_model, count_parameters
from training.diagnostics import context_diagnostics
from training.ema import EMA
from training.meter import Meter
from training.optim import build_optimizers
from training.state import TrainState
from training.step import StepSettings, train_step
from utils import checkpoint, distributed
from utils.device import choose_device, describe
from utils.distributed import World
from utils.environment import append_start, environment, peak_memory_gb
from utils.errors import UserError, reports_user_errors
from utils.files import write_atomically, write_json
from utils.logging import RunLogger

# What a resumed run may do differently: how long, how often and where to, but not what is trained on what.
RESUMABLE_DIFFERENCES = {
    *("train_steps", "max_seconds", "log_interval", "eval_interval", "checkpoint_interval", "keep_checkpoints", "max_nonfinite_steps"),
    *("resume", "logging", "evaluation", "device", "output_dir", "run_name", "project_name"),
}

SHOWN_SCORES = ("ARC/pass@1", "ARC/pass@2", "all.exact_accuracy", "all.accuracy")


def train(config: PretrainConfig) -> None:
    """One training run from its configuration to its last checkpoint."""
    world = World.from_environment()
    device = choose_device(config.device, world)
    distributed.start(world, device)
    folder = Path(config.output_dir) / config.name

    store = datasets.load(config.data.path, *config.layouts)
    sampler = SAMPLERS[store.metadata.layout](store, config.data, config.seed, config.global_batch_size, world.rank, world.size)

    torch.manual_seed(config.seed)
    model = build_model(config.arch, data_sizes(store, config), config.encoder).to(device)
    optimizers, optimizer_name = build_optimizers(model, config, device)
    state = TrainState(model, optimizers, EMA(model, config.ema_rate) if config.ema else None)
    resume(state, config, store, folder, world, device)
    decoder_report = None if state.step else start_from_pretrained(state, config, store, folder, world)

    settings = StepSettings(config.mode, config.objective, config, config.seed, config.global_batch_size, config.train_steps, world)
    info = {
        "config": config.model_dump(),
        "sizes": vars(data_sizes(store, config)),
        "data": {
            "path": config.data.path,
            "layout": store.metadata.layout,
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
    if state.step:
        logger.say(f"resumed at step {state.step}")
    if decoder_report:
        logger.say(decoder_report)

    try:
        loop(state, config, settings, store, sampler, logger, device, info)
    finally:
        logger.close()
        distributed.close()
    if world.is_main:
        print(f"step {state.step}: checkpoint {folder}/checkpoints/step_{state.step}")


def loop(
    state: TrainState,
    config: PretrainConfig,
    settings: StepSettings,
    store: Store,
    sampler: Sampler,
    logger: RunLogger,
    device: torch.device,
    info: dict,
) -> None:
    """Step, log, evaluate, save, until train_steps or max_seconds."""
    table, folder, world = store.grid_table.to(device), Path(config.output_dir) / config.name / "checkpoints", settings.world
    meter, started, skipped_in_a_row, saved = Meter(), time.monotonic(), 0, state.step

    def save() -> int:
        state.save(folder, world, info, sampler.trained_pairs, config.keep_checkpoints)
        return state.step

    while state.step < config.train_steps and not out_of_time(config, started):
        samples = sampler.sample(state.step)
        batch = materialise(samples, store, table)
        result = train_step(state, batch, settings)
        meter.add(result, config.global_batch_size)
        skipped_in_a_row = 0 if result.updated else skipped_in_a_row + 1
        if skipped_in_a_row >= config.max_nonfinite_steps:
            raise UserError(
                f"step {state.step}: the gradient was not finite {skipped_in_a_row} times in a row; last checkpoint: step {saved}"
            )
        last = state.step == config.train_steps
        if state.step % config.log_interval == 0 or last:
            values = meter.read()
            with meter.paused():
                values["timing/peak_memory_gb"] = peak_memory_gb(device)
                values |= context_diagnostics(state.model, samples, store, table, config.seed, state.step, world)
                log(logger, state.step, values, state.optimizers)
        with meter.paused():
            if config.eval_interval and (state.step % config.eval_interval == 0 or last):
                log_evaluation(logger, meter, state, store, sampler, config, device, world)
            if config.logging.images_interval and (state.step % config.logging.images_interval == 0 or last):
                log_pictures(logger, state, store, config, table, world)
            if state.step % config.checkpoint_interval == 0 or last:
                saved = save()
    if saved != state.step:
        save()


def data_sizes(store: Store, config: PretrainConfig) -> DataSizes:
    """What the dataset and the canvas decide about the model."""
    sides = config.data.sides
    return DataSizes(store.game.vocabulary.size, store.metadata.num_puzzle_identifiers, sides[0] ** 2 if len(sides) == 1 else None)


def resume(state: TrainState, config: PretrainConfig, store: Store, folder: Path, world: World, device: torch.device) -> None:
    """Continue this run's newest checkpoint (auto), a named one, or refuse to overwrite an earlier run (never)."""
    existing = checkpoint.latest(folder / "checkpoints")
    if config.resume == "never":
        if existing:
            raise UserError(f"{folder} already holds checkpoints and resume=never would overwrite them; choose another run_name")
        return
    path = existing if config.resume == "auto" else checkpoint.resolve(config.resume)
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


def out_of_time(config: PretrainConfig, started: float) -> bool:
    """Whether max_seconds is over, agreed on by all processes."""
    if config.max_seconds is None:
        return False
    return bool(distributed.sum_tensor(torch.tensor(float(time.monotonic() - started > config.max_seconds))).item())


def log(logger: RunLogger, step: int, values: dict, optimizers: list) -> None:
    """A line in metrics.jsonl and beside the progress bar."""
    logger.log(step, {**values, "train/lr": optimizers[0].param_groups[0]["lr"]})
    shown = {"loss": "train/lm_loss", "acc": "train/accuracy", "exact": "train/exact_accuracy"}
    texts = {short: f"{values[name]:.3f}" for short, name in shown.items() if values.get(name) is not None}
    logger.progress(step, {**texts, "samples/s": f"{values['timing/train_samples_per_second']:.0f}"})


def log_evaluation(
    logger: RunLogger,
    meter: Meter,
    state: TrainState,
    store: Store,
    sampler: Sampler,
    config: PretrainConfig,
    device: torch.device,
    world: World,
) -> None:
    """Score the evaluation tasks with the averaged weights."""
    limit, trained, views, started = config.data.max_eval_groups, sampler.trained_pairs, [], time.perf_counter()
    with averaged_weights(state):
        result = evaluate(
            state.model,
            store,
            config.data,
            config.evaluation,
            config.objective,
            device,
            world,
            seed=config.seed,
            trained_pairs=trained,
            max_tasks=limit,
            report=views.append,
        )
    seconds, asked = time.perf_counter() - started, sum(distributed.gather_objects(sum(views)))
    values = {"protocol": result.protocol, **{f"eval/{name}": n for name, n in result.counts.items()}}
    logger.log(state.step, {**result.metrics(), **values, **meter.evaluated(asked, seconds)})
    shown = (s for s in result.scores if s.metric in SHOWN_SCORES and s.control == "none")
    values = ", ".join(f"{s.metric} {s.value:.3f} [{s.ci_low:.3f}, {s.ci_high:.3f}]" for s in shown)
    logger.say(f"step {state.step}: {result.protocol}, {result.counts['tasks']} tasks: {values}")


def log_pictures(logger: RunLogger, state: TrainState, store: Store, config: PretrainConfig, table: GridTable, world: World) -> None:
    """Draw what the averaged weights answer to a few training and evaluation tasks, under the ancestors' names."""
    for name, split in (("train_predictions", "train"), ("eval_predictions", "test")):
        with averaged_weights(state):
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
    return f"{tasks} training tasks on canvases {sides}{skipped}"


@reports_user_errors
def main() -> None:
    launch("pretrain", PretrainConfig, train)


if __name__ == "__main__":
    main()
