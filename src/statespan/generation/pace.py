"""Pace: measures whether speculation gains time, and turns it off where it loses."""

from collections import deque

WINDOW = 8  # steps of one way by which it is judged
FEW, HOPELESS = 6, 1.5  # after so few steps a trial ends where it is slower by this factor
MARGIN = 1.1  # to take over, a way must be faster by this factor: noise must not flip it
PATIENCE, MOST_PATIENCE = 128, 4096  # steps until a way that lost is tried again; doubled each time it loses


class _Way:
    """One way of making tokens, over its last steps."""

    def __init__(self) -> None:
        self._steps: deque[tuple[float, int]] = deque(maxlen=WINDOW)  # seconds and tokens
        self.recent = 0  # steps since it was last begun

    def begin(self) -> None:
        """It runs from now on."""
        self.recent = 0

    def note(self, seconds: float, tokens: int) -> None:
        self.recent += 1
        if self.recent == 1:
            self._steps.clear()
        self._steps.append((seconds, tokens))

    @property
    def seconds_a_token(self) -> float:
        """The median step's time, which what is compiled or captured once does not touch, over the mean of tokens."""
        middle = sorted(seconds for seconds, _ in self._steps)[(len(self._steps) - 1) // 2]
        return middle * len(self._steps) / max(1, sum(tokens for _, tokens in self._steps))


class Pace:
    """Says before each step whether to speculate, from the measured seconds a token of both ways.

    Plain steps come first, then a trial of speculation. The faster way runs on; the other is tried again after a while
    that doubles each time it loses, and takes over only where it is faster by MARGIN.
    """

    def __init__(self) -> None:
        self.speculating = False
        self._ways = {True: _Way(), False: _Way()}
        self._patience = WINDOW
        self._on_trial = False  # the way that runs is being measured against the other

    def note(self, speculated: bool, seconds: float, tokens: int) -> None:
        """A step took so long and gave so many tokens; it may have been plain for want of drafts."""
        self._ways[speculated].note(seconds, tokens)
        mine, other = self._ways[self.speculating], self._ways[not self.speculating]
        if not self._on_trial:
            if mine.recent >= self._patience:
                self._switch(on_trial=True)
        elif mine.recent >= WINDOW or (mine.recent >= FEW and mine.seconds_a_token > HOPELESS * other.seconds_a_token):
            self._judge(mine.seconds_a_token * MARGIN < other.seconds_a_token)

    def _judge(self, won: bool) -> None:
        """The trial is over: stay with the way that was tried, or go back."""
        if won:
            self._patience, self._on_trial = PATIENCE, False
            self._ways[self.speculating].recent = 0
        else:
            self._patience = min(max(PATIENCE, 2 * self._patience), MOST_PATIENCE)
            self._switch(on_trial=False)

    def _switch(self, on_trial: bool) -> None:
        self.speculating = not self.speculating
        self._ways[self.speculating].begin()
        self._on_trial = on_trial
