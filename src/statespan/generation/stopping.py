"""Stop strings: end the text where one of them is complete, and never show the beginning of one."""

from collections.abc import Sequence


class StopStrings:
    """Text goes in piece by piece; what comes out can no longer become part of a stop string.

    The string that is complete first ends the text, however the pieces are cut; of two that end together the longer.
    No string may be empty.

    Example:
        >>> stops = StopStrings(["END"])
        >>> stops.push("the E"), stops.push("ND of it"), stops.stopped
        ('the ', '', True)
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self.strings = tuple(strings)
        self.stopped = False
        self._held = ""  # a tail that may be the beginning of a stop string

    def push(self, piece: str) -> str:
        """Add a piece; returns the text that is now certain, without a stop string or what follows it."""
        if not self.strings:
            return piece
        if self.stopped or not piece:
            return ""
        text = self._held + piece
        found = [(start + len(stop), start) for stop in self.strings if (start := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        size = self._held_size(text)
        self._held = text[len(text) - size :]
        return text[: len(text) - size]

    def _held_size(self, text: str) -> int:
        """Length of the longest tail of `text` that begins a stop string."""
        longest = min(len(text), max(map(len, self.strings)) - 1)
        for size in range(longest, 0, -1):
            tail = text[-size:]
            if any(stop.startswith(tail) for stop in self.strings):
                return size
        return 0

    def flush(self) -> str:
        """The text held back, once no more follows."""
        held, self._held = self._held, ""
        return held
