"""Search the settings of a training run with Optuna.

    python -m tools.sweep SPACE.yaml --trials 20 --jobs 2
    python -m tools.sweep SPACE.yaml --jobs 8 --launcher slurm --slurm partition=gpu gpus_per_node=1 time=240
    python -m tools.sweep runs/sweeps/SPACE --table
    python -m tools.sweep runs/sweeps/SPACE --page sweep.html
    python -m tools.sweep SPACE.yaml --wandb-yaml wandb.yaml

SPACE.yaml is a file, or a name in config/sweep; docs/sweeps.md says what stands in it. Every trial trains
each seed, and its score is their mean. Trials without prospects are pruned. The same command continues a
sweep that was stopped or killed: a trial that ran goes on from the checkpoint of its run.
"""

import argparse
import math
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

if not __package__:  # called by its path: import from the project's folder, not from this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from omegaconf import OmegaConf

from config.compose import as_overrides
from tools.sweep_page import write_page
from tools.sweep_runs import Local, Process, Slot, command
from tools.sweep_slurm import Slurm
from tools.sweep_space import SweepConfig, find_space, read_space
from tools.sweep_text import FAILURE, SEED, best_line, table
from tools.sweep_wandb import write_wandb_sweep
from utils.arguments import parser_of, positive
from utils.errors import Stopped, UserError, reports_user_errors
from utils.extras import require
from utils.files import exclusive, write_atomically
from utils.logging import read_metrics
from utils.signals import StopRequest

LAUNCHERS = {"local": Local, "slurm": Slurm}
SPACE, STUDY = "sweep.yaml", "study.db"
POLL = 0.5  # seconds
MOST_FAILURES = 3  # without a single success: then the sweep itself is wrong


class Sweep:
    """A sweep's folder: its space, the study, and the runs."""

    def __init__(self, folder: Path, config: SweepConfig):
        require("optuna", "a sweep")
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.optuna, self.folder, self.config = optuna, folder, config
        url = f"sqlite:///{(folder / STUDY).resolve()}"
        self.study = optuna.create_study(
            storage=optuna.storages.RDBStorage(url),
            study_name="sweep",
            direction=config.direction,
            pruner=self._pruner(),
            load_if_exists=True,
        )

    def work(self, launcher: Local | Slurm) -> None:
        """Run trials until enough of them have a score or are pruned. Raises `Stopped` after a signal."""
        self.launcher = launcher
        if self.config.sampler == "grid":
            self._enqueue_grid()
        free, active = list(reversed(launcher.places)), []
        interrupted = self.trials("RUNNING")
        with StopRequest() as stop:
            while True:
                while free and not stop.signal and (trial := self._next(interrupted, len(active))):
                    active.append(Attempt(self, trial, free.pop()))
                if not active:
                    break
                if stop.signal:
                    _end(active)
                    raise Stopped(f"stopped by {stop.signal}; the same command continues {self.folder}")
                time.sleep(POLL)
                for attempt in [one for one in active if not one.goes_on()]:
                    active.remove(attempt)
                    free.append(attempt.slot)
                    print(self._line(attempt.trial.number), flush=True)

    def trials(self, *states: str) -> list[Any]:
        """The trials in these states, or all, in the order of their numbers."""
        wanted = [self.optuna.trial.TrialState[state] for state in states] or None
        return self.study.get_trials(deepcopy=False, states=wanted)

    def _next(self, interrupted: list[Any], active: int) -> Any:
        """An interrupted trial, a new one, or None where none is to be started now."""
        if interrupted:
            known = interrupted.pop(0)
            self.study.sampler = self._sampler(known.number)
            found = self.optuna.trial.Trial(self.study, known._trial_id)
        else:
            wanted = self.config.wanted
            scored, failed = len(self.trials("COMPLETE", "PRUNED")), len(self.trials("FAIL"))
            if not scored and not active and failed >= MOST_FAILURES:
                last = self.trials("FAIL")[-1].user_attrs[FAILURE]
                raise UserError(f"{self.folder}: the first {failed} trials failed; the last: {last}")
            grid_is_done = self.config.sampler == "grid" and not self.trials("WAITING")
            if scored + active >= wanted or grid_is_done or failed >= wanted:
                return None
            # A seed for each trial: a continued sweep draws what an undisturbed one would have drawn.
            self.study.sampler = self._sampler(len(self.trials()))
            found = self.study.ask()
        for key, range_ in self.config.space.items():
            range_.drawn(found, key)  # keeps what it has drawn before
        return found

    def _sampler(self, number: int) -> Any:
        seed, samplers = self.config.sampler_seed * 1_000_003 + number, self.optuna.samplers
        if self.config.sampler != "tpe":
            return samplers.RandomSampler(seed=seed)
        # Trials that run beside this one count as bad ones, so that not all of them try the same.
        return samplers.TPESampler(seed=seed, constant_liar=True)

    def _pruner(self) -> Any:
        chosen, pruners = self.config.pruner, self.optuna.pruners
        if chosen.name == "median":
            return pruners.MedianPruner(chosen.startup_trials, chosen.warmup)
        if chosen.name == "hyperband":
            return pruners.HyperbandPruner(
                min_resource=chosen.min_resource, reduction_factor=chosen.reduction_factor
            )
        return pruners.NopPruner()

    def _enqueue_grid(self) -> None:
        """Every combination of the choices, once."""
        space = self.config.space
        for values in product(*(range_.tried for range_ in space.values())):
            self.study.enqueue_trial(dict(zip(space, values, strict=True)), skip_if_exists=True)

    def _line(self, number: int) -> str:
        trial = self.trials()[number]
        score = trial.user_attrs.get(FAILURE) if trial.state.name == "FAIL" else f"{trial.value:.4g}"
        return f"trial {number} {trial.state.name.lower()}, {score}: {' '.join(as_overrides(trial.params))}"


class Attempt:
    """A trial at work: its seeds one after the other, each as a run with a folder of its own."""

    def __init__(self, sweep: Sweep, trial: Any, slot: Slot):
        self.sweep, self.trial, self.slot, self.metric = sweep, trial, slot, sweep.config.metric
        self.known = set(self._frozen().intermediate_values)
        self.undecided, self.pruned = bool(self.known), False
        self.process = self._start()

    def goes_on(self) -> bool:
        """Look at the run: report its metric, prune the trial, start the next seed, or note the end."""
        status = self.process.poll() if self.process else 0
        if self.process and self.process.started and not self.pruned:
            self._report()
            if self.pruned and not self._is_at_its_end():
                self.process.stop()
        if status is None:
            return True
        if status and not self.pruned:
            return self._fail(f"{self.process.log}: {self.process.last_words()}")
        if self.process and not status and not self._keep_score():
            return False
        seeds = [
            seed for seed in self.sweep.config.seeds if SEED.format(seed) not in self._frozen().user_attrs
        ]
        # A decision that comes with the last value of the last run saves nothing.
        if self.pruned and seeds:
            self.sweep.study.tell(self.trial, state=self.sweep.optuna.trial.TrialState.PRUNED)
            return False
        if seeds:
            self.process = self._start()
            return True
        scores = [self._frozen().user_attrs[SEED.format(seed)] for seed in self.sweep.config.seeds]
        self.sweep.study.tell(self.trial, math.fsum(scores) / len(scores))
        return False

    def _frozen(self) -> Any:
        """The trial as the study has it."""
        return self.sweep.trials()[self.trial.number]

    def _start(self) -> Process | None:
        """The run of the first seed without a score; None where all have one."""
        config, done = self.sweep.config, self._frozen().user_attrs
        waiting = [seed for seed in config.seeds if SEED.format(seed) not in done]
        if not waiting:
            return None
        self.seed = waiting[0]
        runs = self.sweep.folder / "runs"
        name = run_name(self.trial.number, self.seed)
        own = [f"seed={self.seed}", f"run_name={name}", f"output_dir={runs}", "resume=auto"]
        words = [*config.overrides, *as_overrides(self._frozen().params), *own]
        if not any(word.startswith("logging.progress=") for word in words):
            words.append("logging.progress=false")
        # What earlier seeds have logged comes before this one's values.
        finished = config.seeds[: config.seeds.index(self.seed)]
        self.before = sum(len(self._values(seed)) for seed in finished)
        log = self.sweep.folder / "logs" / f"{name}.log"
        return self.sweep.launcher.start(command(words, config.processes), self.slot, runs / name, log)

    def _values(self, seed: int) -> list[float]:
        """The metric's values in the run of a seed so far."""
        file = self.sweep.folder / "runs" / run_name(self.trial.number, seed) / "metrics.jsonl"
        found = (record.get(self.metric) for record in read_metrics(file))
        return [float(value) for value in found if isinstance(value, (int, float))]

    def _report(self) -> None:
        """Tell the study of values that it does not know, and ask it after each whether to go on."""
        for number, value in enumerate(self._values(self.seed), self.before + 1):
            if number not in self.known:
                self.trial.report(value, number)
                self.known.add(number)
                self.undecided = True
            if self.undecided and number == max(self.known):
                self.undecided, self.pruned = False, self.trial.should_prune()
                if self.pruned:
                    return

    def _is_at_its_end(self) -> bool:
        """Whether the run has made its last step, and only has to close."""
        folder = self.process.folder
        steps = OmegaConf.load(folder / "config.yaml").train_steps
        return read_metrics(folder / "metrics.jsonl")[-1]["step"] >= steps

    def _keep_score(self) -> bool:
        """Note what the finished run has reached; False where it has logged nothing to judge it by."""
        values = self._values(self.seed)
        if not values:
            return self._fail(f"{self.process.folder}: metrics.jsonl has no number for {self.metric}")
        better = max if self.sweep.config.direction == "maximize" else min
        score = better(values) if self.sweep.config.score == "best" else values[-1]
        self.trial.set_user_attr(SEED.format(self.seed), score)
        return True

    def _fail(self, why: str) -> bool:
        self.trial.set_user_attr(FAILURE, why)
        self.sweep.study.tell(self.trial, state=self.sweep.optuna.trial.TrialState.FAIL)
        return False


def run_name(number: int, seed: int) -> str:
    """The name of a run: no two of a sweep meet in one folder."""
    return f"trial_{number:04d}-seed_{seed}"


def _end(active: list[Attempt]) -> None:
    """Let all runs save and stop."""
    for process in [attempt.process for attempt in active if attempt.process]:
        process.stop()
    for process in [attempt.process for attempt in active if attempt.process]:
        process.wait()


def begun(folder: Path, config: SweepConfig) -> None:
    """Note in a new folder what its sweep searches.

    Raises `UserError` for a folder of another sweep. How many trials there are may change.
    """
    file = folder / SPACE
    if file.is_file():
        before, now = read_space(file).model_dump(), config.model_dump()
        differing = [key for key in now if before[key] != now[key] and key != "trials"]
        if differing:
            raise UserError(f"{folder} is a sweep with another {differing[0]}; give this one another --name")
    write_atomically(file, lambda path: OmegaConf.save(config.model_dump(), path))


def opened(options: argparse.Namespace) -> tuple[Path, SweepConfig]:
    """The folder of the sweep that the command line means, and what it searches."""
    folder = Path(options.sweep)
    if (folder / SPACE).is_file():
        config = read_space(folder / SPACE)
    else:
        file = find_space(options.sweep)
        config, folder = read_space(file), options.output_dir / (options.name or file.stem)
    changed = {"trials": options.trials} if options.trials else {}
    overrides = [*config.overrides, *options.overrides]
    return folder, SweepConfig(**{**config.model_dump(), **changed, "overrides": overrides})


def judged(config: SweepConfig) -> SweepConfig:
    """The sweep with the metric that it chooses by. Raises `UserError` for a mistake in any of its runs."""
    return config.model_copy(update={"metric": config.chosen_metric(config.first_run())})


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = parser_of("tools.sweep", __doc__)
    add = parser.add_argument
    add("sweep", metavar="SWEEP", help="a file, a name in config/sweep, or the folder of a sweep")
    add("--trials", type=positive, help="how many get a score or are pruned (default: the file's)")
    add(
        "--jobs",
        type=positive,
        help="runs at a time (default: one per GPU, or per group of `processes`; Slurm: 1)",
    )
    add("--launcher", choices=LAUNCHERS, default="local", help="where runs train; default: %(default)s")
    add("--slurm", nargs="+", default=[], metavar="KEY=VALUE", help="options of sbatch, such as time=240")
    add("--name", help="of the sweep's folder (default: the file's)")
    add("--output-dir", type=Path, default=Path("runs/sweeps"), help="default: %(default)s")
    add("--overrides", nargs="*", default=[], metavar="KEY=VALUE", help="of all runs, after the file's")
    add("--table", action="store_true", help="print the trials, the best first, and run nothing")
    add("--page", type=Path, metavar="FILE.html", help="write a page with plots, and run nothing")
    add("--wandb-yaml", type=Path, metavar="FILE", help="write the sweep for W&B's own, and run nothing")
    return parser.parse_args(arguments)


@reports_user_errors
def main() -> None:
    options = parse_arguments()
    if options.launcher == "slurm":
        require("submitit", "--launcher slurm")
    if not options.wandb_yaml:
        require("optuna", "a sweep")
    folder, config = opened(options)
    if options.wandb_yaml:
        write_wandb_sweep(options.wandb_yaml, judged(config))
        print(f"{options.wandb_yaml}: wandb sweep {options.wandb_yaml}, then wandb agent")
        return
    if options.table or options.page:
        if not (folder / STUDY).is_file():
            raise UserError(f"{folder} has no {STUDY}: no sweep was started there")
        sweep = Sweep(folder, config)
        if options.table:
            print(table(sweep.trials(), config))
        if options.page:
            write_page(options.page, folder, sweep.trials(), config)
            print(f"{options.page}: {len(sweep.trials())} trials")
        return
    config = judged(config)
    launcher = LAUNCHERS[options.launcher](folder, config.processes, options)
    with exclusive(folder, "works on this sweep"):
        begun(folder, config)
        sweep = Sweep(folder, config)
        sweep.work(launcher)
    print("\n".join([table(sweep.trials(), config), "", *best_line(sweep.trials(), config)]))


if __name__ == "__main__":
    main()
