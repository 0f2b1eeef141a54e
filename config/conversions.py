"""What values of the ancestors' keys are in ours, where that takes more than another name.

Each function reads the text of a value and the line it stands in. config/ancestors.py says for which key.
"""

from pathlib import Path

import numpy as np
import yaml

from config.translation import OFF, Convert, Line, NoCounterpart, Translation, nothing, truth
from dataset.store import Store
from utils.distributed import World
from utils.errors import UserError
from utils.files import read_json

# Training tasks, and examples per epoch, of the ancestors' own datasets, so that a command line can be read
# before its dataset is built. The first ETRM counts tasks alone. ARC's are those of published checkpoints.
SIZES = {
    "arc-aug-1000": (960, 3978.79),
    "arc1concept-aug-1000": (960, 3978.79),
    "arc2concept-aug-1000": (1280, 5559.66),
    "arc1concept-encoder-aug-1000": (560, 560.0),
    "arc2concept-encoder-aug-1000": (1160, 1160.0),
    "sudoku-extreme-1k-aug-1000": (1000, 1000.0),
    "maze-30x30-hard-1k": (1000, 1000.0),
}
GAMES = {"sudoku": {"data": "sudoku", "data.augmentation": "table"}, "maze": {"data": "maze"}}


def listed(text: str) -> list:
    """The members of `[a,b]`, each as it was typed; anything else is a list of one."""
    try:
        value = yaml.load(text, yaml.BaseLoader)
    except yaml.YAMLError:
        value = text
    return value if isinstance(value, list) else [text]


# Data


def dataset(text: str, line: Line) -> Translation:
    """`data_paths`: the folder, and the settings of its game unless the line chooses some."""
    paths = listed(text)
    if not paths:
        raise ValueError("this names no dataset")
    if len(paths) > 1:
        raise NoCounterpart("one dataset of several sources takes their place, docs/datasets.md")
    path = Path(line.typed.get("data.path", paths[0]))
    about = path / "dataset.json"
    if (path / "train" / "dataset.json").is_file() and not about.is_file():
        raise UserError(
            f"{path} holds an ancestor's files; python -m dataset.npy import {path} FOLDER makes them a "
            "dataset of this framework"
        )
    found = {"data.path": paths[0]}
    if {"data", "experiment"} & line.typed.keys():
        return Translation(found)
    named = next((game for game in GAMES if game in path.name.lower()), "arc")
    game = read_json(about).get("game") if about.is_file() else named
    of_arc = {"data": "arc1_puzzle" if line.read("encoder") is None else "arc1"}
    return Translation(GAMES.get(game, of_arc) | found)


def tested_dataset(text: str, line: Line) -> Translation:
    """`data_paths_test`: the dataset's own test tasks, or nothing."""
    if text.lower() in OFF or text == line.given.get("data_paths"):
        return nothing("the dataset's own test tasks are asked")
    raise NoCounterpart("evaluate.py checkpoint=RUN data_path=FOLDER asks another dataset after the training")


def evaluated_dataset(text: str, line: Line) -> Translation:
    """A folder, or a list with one, for evaluate.py."""
    paths = listed(text)
    if len(paths) != 1:
        raise NoCounterpart("one evaluation asks one dataset")
    return Translation({"data_path": paths[0]})


def evaluated_test_dataset(text: str, line: Line) -> Translation:
    """The same, or `[]` where the dataset of `data_paths` is asked."""
    return nothing("data_paths says it") if text == "[]" else evaluated_dataset(text, line)


def saved_outputs(text: str, line: Line) -> Translation:
    """A list of what is kept; here every view's answer is, or nothing."""
    return Translation({"save_predictions": str(text.lower() not in OFF).lower()})


def evaluators(to: str) -> Convert:
    """The dataset decides what is evaluated, and `to` at which k."""

    def convert(text: str, line: Line) -> Translation:
        entries = [{"name": entry} if isinstance(entry, str) else dict(entry) for entry in listed(text)]
        settings = {key: value for entry in entries for key, value in entry.items() if key != "name"}
        ks = settings.pop("pass_Ks", None)
        if settings:
            raise NoCounterpart(f"a setting of an evaluator, {', '.join(settings)}")
        overrides = {to: f"[{','.join(map(str, ks))}]"} if ks else {}
        return Translation(overrides, "the dataset decides what is evaluated")

    return convert


# The length of a training


def training_size(
    store: Store, max_train: int | None = None, max_eval: int | None = None
) -> tuple[int, float]:
    """`total_groups` and `mean_puzzle_examples`, as an ancestor's train/dataset.json has them, of the first
    tasks of each split or of all."""
    tasks = store.tasks_of("train", max_train)
    pairs = np.diff(store.task_pairs)[tasks]
    if store.layout.learns_rows:  # the evaluation tasks' demonstrations are training data, too
        tested = store.tasks_of("test", max_eval)
        tasks, pairs = np.append(tasks, tested), np.append(pairs, store.task_demonstrations[tested])
    rows = np.diff(store.task_rows)[tasks]
    return int((pairs > 0).sum()), float((rows * pairs).sum() / max(1, rows[pairs > 0].sum()))


def _epoch(line: Line) -> tuple[float, str]:
    """The samples of one epoch, and what is to be said of the number."""
    path, limit = Path(line.read("data.path")), line.read("data.max_train_groups")
    if (path / "dataset.json").is_file():
        tasks, examples = training_size(Store.load(path), limit, line.read("data.max_eval_groups"))
        note = ""
    elif path.name in SIZES:
        tasks, examples = SIZES[path.name][0], SIZES[path.name][1] / SIZES[path.name][0]
        tasks = tasks if limit is None else min(tasks, limit)
        note = f"by the ancestor's {path.name}: there is no dataset at {path} yet"
    else:
        raise UserError(
            f"epochs are counted in a dataset, and there is none at {path}; build it, or give train_steps"
        )
    # An ETRM draws one query of a task, the original takes all pairs of one of its augmentations.
    return tasks * (examples if line.read("encoder") is None else 1), note


def _updates(epochs: str, line: Line) -> tuple[int, str]:
    samples, note = _epoch(line)
    return int(float(epochs) * samples / line.read("global_batch_size")) * _per_batch(line), note


def _per_batch(line: Line) -> int:
    return int(line.read("mode.num_act_steps") or 1)


def epochs(text: str, line: Line) -> Translation:
    """epochs * total_groups * mean_puzzle_examples / global_batch_size, rounded down."""
    if "train_steps" in line.typed:
        raise ValueError(f"train_steps={line.typed['train_steps']} says how long to train, too; give one")
    updates, note = _updates(text, line)
    if updates < 1:
        raise ValueError(
            f"this is less than one update of global_batch_size={line.read('global_batch_size')}"
        )
    return Translation({"train_steps": str(updates)}, note)


def in_epochs(to: str) -> Convert:
    """An interval in epochs, at least one update here."""

    def convert(text: str, line: Line) -> Translation:
        value = text if text.lower() == "null" else str(max(_updates(text, line)[0], _per_batch(line)))
        return Translation({to: value})

    return convert


def eval_interval(text: str, line: Line) -> Translation | None:
    """Epochs in a line that counts its training in them; ours counts updates."""
    return in_epochs("eval_interval")(text, line) if "epochs" in line.given else None


def patience(text: str, line: Line) -> Translation | None:
    """trm001 stops by its evaluation tasks' scores; here training tasks are held out for that."""
    if "--no-validate" in line.given:
        return nothing("nothing is validated")
    one = {} if "eval_interval" in line.given else {"eval_interval": str(max(_updates("1", line)[0], 1))}
    return Translation({"patience": text, "validation": "0.1", "keep_best_checkpoints": "1"} | one)


def in_batches(name: str, same: bool = True) -> Convert:
    """A number of updates, which the first ETRM counts in batches where each of them has several.

    same: the key is called `name` there, too.
    """

    def convert(text: str, line: Line) -> Translation | None:
        if text.lower() == "null" or "arch.num_act_steps" not in line.given:
            return None if same else Translation({name: text})
        return Translation({name: str(int(text) * int(line.given["arch.num_act_steps"]))})

    return convert


# Batches


def accumulated(text: str, line: Line) -> Translation:
    """One update for several batches of theirs; a micro-batch of ours is that of one process."""
    batch = int(line.given.get("global_batch_size") or line.read("global_batch_size"))
    times = line.given.get("grad_accum_steps", "null")
    whole = int(line.given.get("effective_batch_size", batch)) if times == "null" else batch * int(times)
    if whole % batch or whole < batch:
        raise ValueError(f"this is not a multiple of global_batch_size={batch}")
    micro = {"micro_batch_size": str(max(1, batch // World.from_environment().size))} if whole > batch else {}
    return Translation({"global_batch_size": str(whole)} | micro)


def batch(text: str, line: Line) -> Translation | None:
    """The batch of one accumulation step where there are several."""
    several = {"effective_batch_size", "grad_accum_steps"} & line.given.keys()
    return nothing("the batch of one accumulation step") if several else None


# The model


def perturbation(text: str, line: Line) -> Translation:
    """Read there only where ACT steps share an update."""
    if float(text) and not line.given.get("grad_aggregation", "").startswith("stack_supervisions"):
        return nothing("read there with grad_aggregation=stack_supervisions... alone")
    return Translation({"arch.carry_noise": text})


def arch(text: str, line: Line) -> Translation | None:
    """A name, or a class such as `recursive_reasoning.trm@...`."""
    name = text.split("@")[0].rsplit(".", 1)[-1]
    if name == "etrmtrm":
        return Translation({"arch": "etrm", "encoder": "iterative"})
    name = "etrm" if name in ("trm_encoder", "trm_encoder_original") else name
    return None if name == text else Translation({"arch": name})


def encoder(text: str, line: Line) -> Translation:
    """A name; the recurrent encoders read demonstrations in one way only."""
    recurrent = line.given.get("arch") == "etrmtrm" or "arch.recurrent_encoder_type" in line.given
    return (
        nothing("without effect there, too, beside a recurrent encoder")
        if recurrent
        else Translation({"encoder": text})
    )


def recurrent_encoder(text: str, line: Line) -> Translation:
    """The two kinds of it, with what the ancestor's configuration says of each."""
    kinds = {
        "recurrent_standard": {"encoder.update": "read"},
        "trm_style": {
            "encoder.update": "recursive",
            "encoder.H_cycles": "3",
            "encoder.L_cycles": "4",
            "encoder.update_layers": "2",
        },
    }
    if text not in kinds:
        raise ValueError(f"this is {' or '.join(kinds)}")
    return Translation({"encoder": "iterative"} | kinds[text])


def if_read(to: str, reader: str, *values: str) -> Convert:
    """A setting `to` that the ancestor ignores unless `reader`, if the encoder has it, is one of `values`."""

    def convert(text: str, line: Line) -> Translation:
        found = line.read(reader)
        if found is not None and str(found) not in values:
            return nothing(f"without effect there, too, for {reader}={found}")
        return Translation({to: text})

    return convert


def with_encoder(to: str | None) -> Convert:
    """A setting of puzzle rows that is `to` for an encoder; None: an encoder does without it."""

    def convert(text: str, line: Line) -> Translation | None:
        if line.swept & {"arch", "encoder"} or line.read("encoder") is None:
            return None
        if to and line.read(to) is None:
            return None
        return Translation({to: text}) if to else nothing("a model with an encoder has no puzzle rows")

    return convert


def if_known(key: str) -> Convert:
    """A setting of ours that only some architectures have; the original lets the others carry it."""

    def convert(text: str, line: Line) -> Translation | None:
        known = "arch" in line.swept or line.read(key) is not None
        return None if known else nothing("the original ignores it, too")

    return convert


def layer_scale(text: str, line: Line) -> Translation:
    """0 is off there."""
    return Translation({"encoder.layer_scale": text if float(text) else "null"})


def loss_type(text: str, line: Line) -> Translation:
    """The name of a loss function."""
    kinds = {"stablemax_cross_entropy": "stablemax", "softmax_cross_entropy": "softmax"}
    if text not in kinds:
        raise ValueError(f"this is {' or '.join(kinds)}")
    return Translation({"objective": kinds[text]})


def kl_weight(text: str, line: Line) -> Translation:
    """There the mean KL joins a sum over the batch, so that its effect is divided by the batch size."""
    weight = float(text)
    if not line.read("encoder.variational"):
        return nothing("the context is not variational")
    weight /= line.read("global_batch_size")
    return Translation(
        {"objective.kl_weight": f"{weight:g}"}, "divided by global_batch_size, as its effect there"
    )


# Optimisation and weights


def encoder_lr(text: str, line: Line) -> Translation:
    """A multiple of `lr`; a separate optimiser decays the encoder's weights a tenth as much."""
    scale = float(text)
    if not scale:
        return Translation({"encoder_lr": "null"})
    rate, decay = scale * float(line.read("lr")), 0.1 * float(line.read("weight_decay"))
    return Translation({"encoder_lr": f"{rate:g}", "encoder_weight_decay": f"{decay:g}"})


def freeze_weights(text: str, line: Line) -> Translation:
    """Only puzzle rows learn; the first ETRM carries the key without reading it."""
    if not truth(text):
        return nothing("the default")
    if line.read("encoder") is not None:
        raise NoCounterpart(
            "the first ETRM ignores it; freeze_decoder_steps=all keeps the recursion as it is"
        )
    return Translation({"freeze_decoder_steps": "all"})


def clip(text: str, line: Line) -> Translation | None:
    """0 is off there."""
    return None if text.lower() == "null" or float(text) else Translation({"grad_clip_norm": "null"})


def load_checkpoint(text: str, line: Line) -> Translation:
    """A file of theirs gives its recursion, a checkpoint of ours its encoder, too."""
    if text == "null":
        return nothing("the default")
    whole = Path(text).is_dir() and line.read("encoder") is not None
    return Translation({"load_pretrained_decoder": text} | ({"pretrained_encoder": "load"} if whole else {}))


def folder(text: str, line: Line) -> Translation:
    """Where checkpoints go; a run has a folder of its own in it."""
    return nothing("the default") if text == "null" else Translation({"output_dir": text})
