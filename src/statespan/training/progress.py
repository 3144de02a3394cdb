"""Progress on the screen: a live bar on a terminal, a line now and then elsewhere."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn

SECONDS_BETWEEN_LINES = 5.0


class ProgressDisplay:
    """Shows how far a phase of the work is, with figures beside it; phases follow each other.

    Args:
        console: where to write; None: standard error.

    Example:
        >>> with ProgressDisplay() as display:
        ...     display.show("training", 0.5, "loss 1.234")
        ...     display.say("half of it is done")
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._last_line = 0.0
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TextColumn("{task.fields[text]}"),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self._phase, self._task = "", TaskID(-1)

    def show(self, phase: str, share: float, text: str = "") -> None:
        """`share` (0 to 1) of `phase` is done."""
        if not self.console.is_terminal:
            if time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES or share >= 1:
                self.say(f"{phase} {min(share, 1.0):4.0%}  {text}")
                self._last_line = time.monotonic()
            return
        if phase != self._phase:
            if self._phase:
                self._bar.remove_task(self._task)
            self._phase, self._task = phase, self._bar.add_task(phase, total=1.0, text=text)
        self._bar.update(self._task, completed=min(share, 1.0), text=text)

    def say(self, line: str) -> None:
        """A line that stays."""
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()


def duration(seconds: float) -> str:
    """Seconds as m:ss, or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
