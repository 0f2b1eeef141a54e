"""What is done with a task's demonstrations before the task is asked.

Here are the base of all protocols and the two short ones.
Shapes: B views, K demonstrations, T tokens of the context, D hidden.
"""

from collections.abc import Generator
from typing import Generic, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from dataset.layouts import Layout
from dataset.views import EvaluationSet, ViewBatch
from evaluation.respondent import Respondent
from evaluation.voting import Ranking
from models.latent_search import LatentSearchConfig, search
from utils.config import NamedConfig

C = TypeVar("C", bound=NamedConfig)
Batches = Generator[ViewBatch, None, None]


class Adaptation(Generic[C]):
    """What one protocol does. A new one is a subclass, its configuration, and a row of `protocols.PROTOCOLS`.

    adapts: whether anything is done at all.
    learns_rows: whether puzzle rows are learned, so that a model can answer a dataset for which it has none.
    leaves_weights: whether the model still holds the weights that answered when the evaluation is over.
    """

    adapts = True
    learns_rows = False
    leaves_weights = True

    def __init__(self, config: C, respondent: Respondent, seed: int, batch_size: int):
        self.config, self.respondent = config, respondent
        self.seed, self.batch_size = seed, batch_size

    @classmethod
    def refuses(cls, config: C, layout: Layout, ranking: Ranking, vote_stop: bool) -> str | None:
        """Why models of `layout` cannot be adapted, or their answers not be voted on, in this way.

        None: nothing speaks against it.
        """
        if ranking == "agreement" and not layout.reads_demonstrations:
            return "ranking=agreement asks the demonstrations, which only a model with an encoder reads"
        return None

    @classmethod
    def less_memory(cls, config: C, batch_size: int) -> str:
        """What to change when an evaluation does not fit into memory."""
        return f"lower batch_size={batch_size}"

    def batches(self, questions: EvaluationSet, views: slice, queries: np.ndarray) -> Batches:
        """This process's share of the chosen views of the queries (Q,) bool (`EvaluationSet.batches`).

        Between two batches the model may change: it has to answer a batch before the next one is drawn.
        """
        world = self.respondent.world
        yield from questions.batches(self.batch_size, world.rank, world.size, views, queries)

    def shift(self, data: dict[str, Tensor]) -> Tensor | None:
        """What is added to the contexts of a batch, (B, T, D); None: nothing."""
        return None


class AsItIsConfig(NamedConfig):
    """No adaptation.

    `auto` is whatever model and training data imply. The others are an error where they are not so.
    """

    name: Literal["auto", "inductive", "transductive"]


AS_IT_IS = AsItIsConfig(name="auto")


class AsItIs(Adaptation[AsItIsConfig]):
    """The model answers with the weights and contexts that training and encoder made."""

    adapts = False


def as_it_is(respondent: Respondent, batch_size: int, seed: int = 0) -> Adaptation:
    """The adaptation that does nothing."""
    return AsItIs(AS_IT_IS, respondent, seed, batch_size)


class LatentSearch(Adaptation[LatentSearchConfig]):
    """A better context for every view is searched among its demonstrations (models/latent_search.py)."""

    config: LatentSearchConfig

    @classmethod
    def refuses(
        cls, config: LatentSearchConfig, layout: Layout, ranking: Ranking, vote_stop: bool
    ) -> str | None:
        if not layout.reads_demonstrations:
            return (
                "protocol=latent_search searches a context that an encoder computes, "
                "and this model has no encoder"
            )
        if ranking == "agreement" and config.start == "mean":
            return (
                "ranking=agreement would ask contexts that protocol.start=mean has not searched; "
                "use protocol.start=encoder"
            )
        return super().refuses(config, layout, ranking, vote_stop)

    def shift(self, data: dict[str, Tensor]) -> Tensor:
        # A search asks K demonstrations per view, so a portion has as many rows as a batch has views.
        portion = max(1, self.batch_size // data["demo_mask"].shape[1])
        portions = [
            {name: value[start : start + portion] for name, value in data.items()}
            for start in range(0, len(data["inputs"]), portion)
        ]
        model, objective = self.respondent.model, self.respondent.objective
        # Every portion draws the same random shifts: a view's must not depend on its place in a batch.
        return torch.cat(
            [
                search(model, part, objective, self.config, torch.Generator().manual_seed(self.seed))
                for part in portions
            ]
        )
