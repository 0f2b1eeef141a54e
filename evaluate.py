"""Evaluate a checkpoint on held-out tasks: python evaluate.py checkpoint=runs/NAME [key=value ...], also under torchrun.

Checkpoint -> predictions over augmented views -> votes -> pass@k with intervals and controls, results.json,
per_example.jsonl, submission.json and report.html.
"""

import shlex
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from config.compose import launch
from config.schema import EvaluateConfig
from dataset import store as datasets
from dataset.batch import DataConfig
from evaluation.evaluate import Evaluation, evaluate, write_files
from models.losses import ObjectiveConfig
from models.pretrained import load_checkpoint
from utils import checkpoint, distributed
from utils.device import choose_device, describe, explains_out_of_memory
from utils.distributed import World
from utils.errors import UserError, reports_user_errors


@distributed.reports_lost_peers()
def run(config: EvaluateConfig) -> None:
    """One evaluation, from the checkpoint to its files and the table in the terminal."""
    world = World.from_environment()
    device = choose_device(config.device, world)
    distributed.start(world, device)
    path = checkpoint.resolve(config.checkpoint)
    model, info = load_checkpoint(path, config.weights)
    data = DataConfig(**{**info["config"]["data"], **({"path": config.data_path} if config.data_path else {})})
    store = datasets.load(data.path, info["data"]["layout"])
    if store.metadata.game != info["data"]["game"]:
        raise UserError(f"{path} was trained on {info['data']['game']} and cannot answer {store.path}, which holds {store.metadata.game}")
    if store.metadata.layout == "pairs" and data.sides != (store.metadata.max_grid_size,):
        sides = " and ".join(f"{side}x{side}" for side in (data.sides[-1], store.metadata.max_grid_size))
        raise UserError(f"{path} was trained on another size of {store.metadata.game} than {store.path} holds: {sides}")
    if store.metadata.layout == "puzzle" and store.metadata.content_hash != info["data"]["hash"]:
        raise UserError(f"{path} has one learned row per puzzle of the dataset it was trained on; {store.path} is another dataset")
    if store.metadata.content_hash == info["data"]["hash"]:
        store = store.hold_out(info["config"].get("validation"))
    if config.split == "validation" and not len(store.tasks_of("validation")):
        raise UserError(f"{path} was trained without validation tasks of {store.path} (validation=N holds them out); choose another split")

    trained_on = {"test": data.max_eval_groups, "train": data.max_train_groups, "validation": None}[config.split]
    limits = [limit for limit in (config.max_eval_groups, trained_on) if limit is not None]
    trained_pairs = checkpoint.load_torch(path / "trained_pairs.pt").numpy().view("uint64")
    started = time.monotonic()
    with (
        tqdm(unit="view", disable=not world.is_main, desc="views", leave=False, file=sys.stderr) as bar,
        explains_out_of_memory("the evaluation", f"lower batch_size={config.batch_size}"),
    ):
        evaluation = evaluate(
            model.to(device),
            store,
            data,
            config,
            ObjectiveConfig(**info["config"]["objective"]),
            device,
            world,
            seed=config.seed,
            trained_pairs=trained_pairs,
            split=config.split,
            subsets=config.subsets,
            max_tasks=min(limits, default=None),
            report=bar.update,
        )
    if world.is_main:
        about = {
            "dataset": {"path": data.path, "layout": store.metadata.layout, "sha256": store.metadata.content_hash},
            "checkpoint": {"path": str(path), "step": info["step"], "weights": config.weights, "git_commit": info["git_commit"]},
            "model": {
                "arch": info["config"]["arch"]["name"],
                "encoder": (info["config"]["encoder"] or {}).get("name"),
                "parameters": info["parameters"],
            },
            **config.model_dump(include={"split", "subsets", "num_views", "batch_size", "seed"}),
            "max_eval_groups": min(limits, default=None),
            "git_commit": checkpoint.git_commit(),
            "torch": torch.__version__,
            "device": describe(device),
            "processes": world.size,
            "seconds": round(time.monotonic() - started, 2),
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        }
        folder = output_folder(config, path, info["step"], data.path)
        write_files(folder, evaluation, about, config.report)
        print(table(evaluation, config))
        print(f"{folder}: results.json, per_example.jsonl, submission.json" + (", report.html" if config.report else ""))
    distributed.close()


def output_folder(config: EvaluateConfig, path: Path, step: int, data_path: str) -> Path:
    """The named folder, or one inside the run folder whose name tells this evaluation from others of the run."""
    if config.output_dir:
        return Path(config.output_dir)
    other_data = f"-{Path(data_path).name}" if config.data_path else ""
    return path.parent.parent / "evaluations" / f"step_{step}-{config.weights}-{config.split}{other_data}"


def table(evaluation: Evaluation, config: EvaluateConfig) -> str:
    """The scores as text: one line per control, with intervals, denominator and protocol."""
    metrics = list(dict.fromkeys(score.metric for score in evaluation.scores))
    last = f"tasks_solved@{config.pass_ks[min(1, len(config.pass_ks) - 1)]}"
    arc = ["ARC/single_view", *(f"ARC/pass@{k}" for k in config.pass_ks[:2]), last]
    shown = arc if arc[0] in metrics else metrics
    counts = evaluation.counts
    lines = [
        f"protocol {evaluation.protocol}, split {config.split}: {counts['tasks']} tasks, {counts['queries']} queries "
        f"({counts['no_prediction']} without a prediction, {counts['answer_exceeds_canvas']} larger than their canvas, "
        f"{counts['unlabelled']} unlabelled), {evaluation.num_views} view{'s' * (evaluation.num_views > 1)}, 95 % intervals",
        "",
        f"{'':<26}" + "".join(f"{name:<26}" for name in shown),
    ]
    for control in dict.fromkeys(score.control for score in evaluation.scores):
        by_name = {s.metric: s for s in evaluation.scores if s.control == control}
        cells = (f"{100 * s.value:5.1f} % [{100 * s.ci_low:.1f}, {100 * s.ci_high:.1f}]" for s in (by_name[name] for name in shown))
        lines.append(f"{'model' if control == 'none' else control:<26}" + "".join(f"{cell:<26}" for cell in cells))
    return "\n".join([*lines, "", *evaluation.notes])


@reports_user_errors
def main() -> None:
    launch("evaluate", EvaluateConfig, run)


if __name__ == "__main__":
    main()
