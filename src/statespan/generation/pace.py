"""Pace: says before each step whether to speculate, from what steps of both ways have cost and given."""

from collections import defaultdict, deque
from enum import Enum
from statistics import median_low

WINDOW = 16  # steps of a kind by whose median the next one is judged
FEW = 4  # plain steps that must be known before a trial
MARGIN, WORSE = 1.05, 0.97  # of plain speed: where speculation begins, and where it ends
SHARE = 0.02  # of the time may be lost to trials of the slower way
CREDIT = 5.0  # plain steps that they may lose at once in the beginning
MOST_DEBT = 50.0  # plain steps: whatever a trial lost, no more is waited for
LEAST_LOSS = 0.05  # plain steps, expected of a step of a trial: so often it may be begun at most
TRIAL_ROWS = 4  # rows' steps that a trial measures
CHANGE = 0.3  # plain steps that a change of the way may lose
MOST_UNSTEADY = 6  # steps of a trial that measure nothing; then it is over
MEMORY = 24  # rows' steps as which all older ones count, at most


class Kind(Enum):
    """Of steps, as they differ in cost."""

    PLAIN = 0
    VERIFIED = 1
    VAIN = 2  # drafts were asked for and there were none


class Pace:
    """Speculate where it is faster: where t1 E > tv, by a margin.

    t1 and tv, the seconds of a plain step and of one that drafts and verifies, are medians over the last steps with
    about as many rows. E, a row's tokens from a step that verifies, is a mean that forgets, over all rows: what a
    drafter is worth, the next request need not find out again. The slower way is tried now and then, for so few steps
    that at most SHARE of the time is lost.
    """

    def __init__(self) -> None:
        self._seconds: defaultdict[tuple[Kind, int], deque[float]] = defaultdict(lambda: deque(maxlen=WINDOW))
        self._tokens = _Mean()  # of a row, from a step that verified
        self._drafted = _Mean()  # share of the speculating steps that had drafts
        self._on = False  # speculation is the faster way, as far as is known
        self._trial = self._unsteady = 0  # steps of the other way still to be measured; unmeasured ones so far
        self._allowance = CREDIT  # plain steps that trials may lose

    def speculates(self, num_rows: int) -> bool:
        """Whether the next step, of so many rows, is to speculate."""
        size = _bucket(num_rows)
        gain = self._gain(size)
        if gain is not None and (gain < WORSE if self._on else gain > MARGIN):
            self._on, self._trial = not self._on, 0
        if self._trial == 0:
            few = len(self._seconds[Kind.PLAIN, size]) < FEW
            count = FEW if self._on else max(1, TRIAL_ROWS // num_rows)
            # What plain steps cost must be known; else a look at the other way must not cost much.
            if (few and self._on) or (not few and self._allowance >= CHANGE + count * self._loss(gain)):
                self._trial, self._unsteady = count, 0
        return self._on != (self._trial > 0)

    def note(self, num_rows: int, kind: Kind, seconds: float, tokens: int, *, steady: bool = True) -> None:
        """A step took so long and gave all rows together so many tokens.

        Args:
            num_rows: of the step.
            kind: of the step.
            seconds: since the one before, or its own.
            tokens: of all rows.
            steady: whether the next such step would take as long: not where a drafter had to read what plain steps
                said. Steps that compile or capture are not to be noted.
        """
        size = _bucket(num_rows)
        if steady:
            self._seconds[kind, size].append(seconds)
            if kind != Kind.PLAIN:
                self._drafted.add(float(kind == Kind.VERIFIED), 1)
            if kind == Kind.VERIFIED:
                self._tokens.add(tokens / num_rows, num_rows)
        plain = self._cost(Kind.PLAIN, size) or seconds
        if self._trial == 0:
            self._allowance += SHARE * seconds / plain
            return
        worth = tokens / num_rows / ((self._gain(size) or 1.0) if self._on else 1.0)
        lost = max(0.0, seconds / plain - worth)
        self._allowance = max(self._allowance - lost, -MOST_DEBT)
        self._trial -= steady
        self._unsteady += not steady
        if (steady and self._allowance < 0) or self._unsteady >= MOST_UNSTEADY:
            self._trial = 0

    def _gain(self, size: int) -> float | None:
        """How much faster speculation is than plain steps; None: not known yet."""
        drafted = self._drafted.value or 0.0
        kind = Kind.VERIFIED if drafted > 0 else Kind.VAIN
        known = [rows for some, rows in self._seconds if some == kind and self._cost(Kind.PLAIN, rows) is not None]
        if not known:
            return None
        size = min(known, key=lambda rows: max(rows, size) / min(rows, size))  # the next one to it
        plain, seconds = self._cost(Kind.PLAIN, size), self._cost(kind, size)
        assert plain is not None and seconds is not None  # as they are known
        vain = self._cost(Kind.VAIN, size) or plain
        return plain * self._worth / (drafted * seconds + (1 - drafted) * vain)

    @property
    def _worth(self) -> float:
        """A row's tokens from a step that speculates."""
        drafted, tokens = self._drafted.value or 0.0, self._tokens.value or 1.0
        return drafted * tokens + 1 - drafted

    def _loss(self, gain: float | None) -> float:
        """What a step of the other way is expected to lose, in plain steps."""
        if gain is None:
            return 1.0
        return max(1 - 1 / gain if self._on else self._worth * (1 / gain - 1), LEAST_LOSS)

    def _cost(self, kind: Kind, size: int) -> float | None:
        seconds = self._seconds.get((kind, size))
        return median_low(seconds) if seconds else None


class _Mean:
    """A mean that forgets."""

    def __init__(self) -> None:
        self.value: float | None = None
        self._seen = 0

    def add(self, value: float, weight: int) -> None:
        """`weight` observations of this mean value."""
        old = min(self._seen, MEMORY)
        self._seen += weight
        self.value = value if self.value is None else (old * self.value + weight * value) / (old + weight)


def _bucket(num_rows: int) -> int:
    """Steps of so many rows are alike: powers of 2."""
    return 1 << (num_rows - 1).bit_length()
