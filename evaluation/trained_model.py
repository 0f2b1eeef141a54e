"""A trained model, read from its checkpoint. Nothing else in this folder knows the keys of info.json."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dataset.batch import DataConfig
from dataset.layouts import LAYOUTS, Layout
from models.core import RecursiveModel
from models.losses import ObjectiveConfig
from models.pretrained import load_checkpoint, trained_config
from utils import checkpoint


@dataclass(frozen=True, eq=False)
class TrainedModel:
    """A model, and what its checkpoint says of its training.

    path: the checkpoint's folder. weights: `ema` or `raw`. info: info.json.
    trained_pairs (N,) uint64: fingerprints of all pairs behind the weights.
    """

    path: Path
    weights: str
    model: RecursiveModel
    info: dict[str, Any]
    trained_pairs: np.ndarray

    @classmethod
    def load(cls, path: str | Path, weights: str) -> "TrainedModel":
        """The model of a checkpoint folder, of a run folder's newest checkpoint, or of `<run folder>/best`.

        Raises `UserError` for what is none, or is damaged.
        """
        path = checkpoint.resolve(path)
        model, info = load_checkpoint(path, weights)
        return cls(path, weights, model, info, checkpoint.load_trained_pairs(path))

    @property
    def run_folder(self) -> Path:
        """The folder of the run that the checkpoint belongs to."""
        return self.path.parent.parent

    @property
    def step(self) -> int:
        """The training steps behind the weights."""
        return self.info["step"]

    @property
    def git_commit(self) -> str | None:
        """The commit of the code that trained."""
        return self.info["git_commit"]

    @property
    def arch(self) -> str:
        """The name of the architecture."""
        return self.info["config"]["arch"]["name"]

    @property
    def encoder(self) -> str | None:
        """The name of the encoder, None without one."""
        return (self.info["config"]["encoder"] or {}).get("name")

    @property
    def parameters(self) -> dict[str, int]:
        """The number of parameters, by part."""
        return self.info["parameters"]

    @property
    def objective(self) -> ObjectiveConfig:
        """The loss that was trained."""
        return ObjectiveConfig.of_run(self.info["config"]["objective"])

    def data(self, path: str | None = None) -> DataConfig:
        """The canvases and demonstrations of the training, for its dataset or the one at `path`."""
        values = trained_config(self.info)["data"]
        return DataConfig(**{**values, **({"path": path} if path else {})})

    @property
    def validation(self) -> int | float | None:
        """How many training tasks, or which share, were held out."""
        return self.info["config"].get("validation")

    @property
    def layout(self) -> Layout:
        """How the model got to know its tasks."""
        return LAYOUTS[self.info["data"]["layout"]]

    @property
    def game(self) -> str:
        """The game of the training data."""
        return self.info["data"]["game"]

    @property
    def data_hash(self) -> str:
        """The hash of the training data's content."""
        return self.info["data"]["hash"]
