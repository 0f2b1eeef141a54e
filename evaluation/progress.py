"""How far an evaluation is: counted for programs; a bar with rate, rest and partial score in a terminal."""

import sys
from types import TracebackType

from tqdm import tqdm

from evaluation.canvas_scores import CanvasScores
from utils.distributed import World


class Progress:
    """Is told how an evaluation goes on, and counts.

    views: how many this process has answered so far, those of the controls among them.
    """

    def __init__(self) -> None:
        self.views = 0

    def begins(self, views: int, control: str) -> None:
        """All processes together are now asked so many views at most."""

    def answered(self, views: int) -> None:
        """This process has answered so many more."""
        self.views += views

    def scored(self, scores: CanvasScores) -> None:
        """The scores of this process's views have changed."""


class ProgressBar(Progress):
    """A line of standard error, where that is a terminal: the main process's share stands for all."""

    def __init__(self, world: World):
        super().__init__()
        self.processes = world.size
        self.bar = tqdm(
            unit="view",
            desc="views",
            leave=False,
            dynamic_ncols=True,
            disable=None if world.is_main else True,  # None: where there is no terminal
            file=sys.stderr,
        )

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()

    def begins(self, views: int, control: str) -> None:
        """Start anew, with a control's name before the bar."""
        self.bar.reset(total=-(-views // self.processes))
        self.bar.set_postfix_str("", refresh=False)
        self.bar.set_description("views" if control == "none" else control)

    def answered(self, views: int) -> None:
        """Move on."""
        super().answered(views)
        self.bar.update(views)

    def scored(self, scores: CanvasScores) -> None:
        """Show how many single views are right; votes come when all are answered."""
        if not self.bar.disable:  # reading them waits for the device
            right, known = scores.right()
            self.bar.set_postfix_str(f"{right} of {known} right" if known else "", refresh=False)
