"""How likely each bucket and each task is to be drawn, from the shares of the tasks."""

from dataclasses import dataclass

import numpy as np

from dataset.batch import Bucket

# The tasks of a bucket, and how often each is drawn relative to all others, in that bucket or another one.
Shares = dict[Bucket, tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Choice:
    """The tasks of one bucket and the cumulative probability of each."""

    tasks: np.ndarray
    cumulative: np.ndarray

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """`count` tasks, each of them on its own."""
        return self.tasks[np.searchsorted(self.cumulative, rng.random(count), side="right")]


class Chances:
    """buckets: those in use. bucket_cumulative: the cumulative probability of each. choices: its tasks."""

    def __init__(self, shares: Shares):
        self.shares = shares
        self.buckets = sorted(shares)
        mass = np.array([sum(shares[bucket][1].tolist()) for bucket in self.buckets])
        self.bucket_cumulative = np.cumsum(mass) / mass.sum()
        self.choices = {bucket: self._choice(*shares[bucket]) for bucket in self.buckets}

    def bucket(self, rng: np.random.Generator) -> Bucket:
        """One of the buckets."""
        number = int(np.searchsorted(self.bucket_cumulative, rng.random(), side="right"))
        return self.buckets[min(number, len(self.buckets) - 1)]

    def times(self, factors: np.ndarray) -> "Chances":
        """The chances with every task's share multiplied by its factor, (T,) above zero."""
        return Chances({bucket: (tasks, of * factors[tasks]) for bucket, (tasks, of) in self.shares.items()})

    @staticmethod
    def _choice(tasks: np.ndarray, shares: np.ndarray) -> Choice:
        # The last value is exactly 1: rounding must not leave room above it for a number below 1.
        return Choice(tasks, np.append(np.cumsum(shares)[:-1] / shares.sum(), 1.0))
