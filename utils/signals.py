"""A polite end: a signal asks the run to save and stop at the next step boundary."""

import signal
from types import FrameType, TracebackType

ASKING_TO_STOP = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Inside the context, SIGTERM, SIGUSR1 (schedulers before preemption) and SIGINT (Ctrl-C) are noted
    instead of obeyed.

    A second Ctrl-C interrupts at once.
    """

    def __init__(self) -> None:
        self.signal: str | None = None

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._note) for number in ASKING_TO_STOP}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name
