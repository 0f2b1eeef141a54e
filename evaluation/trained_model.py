"""A trained model, read from its checkpoint. Nothing else in this folder knows the keys of info.json."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from dataset.batch import DataConfig
from dataset.layouts import LAYOUTS, Layout
from models.core import RecursiveModel
from models.losses import ObjectiveConfig
from models.pretrained import load_checkpoint, trained_config
from utils import checkpoint, hub
from utils.device import faster_dtype

AskedDtype = Literal["checkpoint", "auto", "float32", "bfloat16"]


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
    def load(
        cls, path: str | Path, weights: str, device: torch.device, forward_dtype: AskedDtype = "checkpoint"
    ) -> "TrainedModel":
        """The model of a checkpoint folder, of a run folder's newest checkpoint, of `<run folder>/best`, or
        of `hub:owner/name@revision`.

        device: where the caller will put it. forward_dtype: of its activations; `checkpoint`: as in training,
        `auto`: the faster one on the device.
        Raises `UserError` for what is no checkpoint, or is damaged.
        """
        path = checkpoint.resolve(path)
        dtype = faster_dtype(device)[0] if forward_dtype == "auto" else forward_dtype
        model, info = load_checkpoint(path, weights, None if dtype == "checkpoint" else dtype)
        return cls(path, weights, model, info, checkpoint.load_trained_pairs(path))

    def slow_on(self, device: torch.device) -> str | None:
        """That `device` would compute faster in another dtype, where it would: a word for who waits."""
        dtype, (faster, why) = self.model.config.forward_dtype, faster_dtype(device)
        if dtype == faster or dtype != "bfloat16":
            return None
        return f"{dtype} as in training, but {why}: forward_dtype={faster} is faster and may change answers"

    @property
    def run_folder(self) -> Path:
        """The folder of the run that the checkpoint belongs to."""
        return self.path.parent.parent

    @property
    def evaluations(self) -> Path:
        """Where its evaluations go unless another folder is named. A cache is no place for results."""
        if not self.run_folder.is_relative_to(hub.cache_folder()):
            return self.run_folder / "evaluations"
        name = self.run_folder.relative_to(hub.cache_folder())
        return Path("runs") / "hub" / "-".join(name.parts) / "evaluations"

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
    def trained_on(self) -> str | None:
        """What a game's model was trained on, in words (`Store.trained_on`); None where nobody noted it."""
        return self.info["data"].get("trained_on")

    @property
    def data_hash(self) -> str:
        """The hash of the training data's content."""
        return self.info["data"]["hash"]
