"""What the rows of an experiment on text show: held-out figures, their order, and how the gaps grow with training."""

import itertools
from collections.abc import Mapping, Sequence

from statespan.lab import rows as table
from statespan.lab.experiment import Line, Plot, Row

SMOOTHED = 5  # points of the curves that a gap is the mean of


class HeldOut:
    """Held-out bits per byte of the variants that are there, and the curves of their training.

    Args:
        rows: of `train_on_text`, with variant and seed.
        variants: in the order of the page.
    """

    def __init__(self, rows: Sequence[Row], variants: Mapping[str, str]) -> None:
        self._rows = rows
        self.present = [variant for variant in variants if table.values(rows, "held_out", variant=variant)]
        self.bits = {variant: table.mean_of(rows, "held_out", variant=variant) for variant in variants}

    def falls(self, *variants: str) -> bool | None:
        """Whether each variant is better than the one before it; None where one is missing."""
        pairs = itertools.pairwise(self.bits[variant] for variant in variants)
        return table.all_of(*(table.ordered(worse, better) for worse, better in pairs))

    def told(self, *variants: str) -> str:
        """Their means, by name."""
        return table.told({variant: self.bits[variant] for variant in variants}, 3)

    def figure(self, variant: str) -> str | None:
        """Mean and range over the seeds."""
        return table.spread(self._rows, "held_out", 3, variant=variant)

    def parameters(self, variant: str) -> str:
        """Their number."""
        return f"{max(table.values(self._rows, 'parameters', variant=variant)):,}"

    def plots(self, base: str) -> list[Plot]:
        """The curves of training, and how far each variant is above `base` on the same rows."""
        curves = table.lines(self.present, self._rows, "step", "bits_per_byte")
        plots = [Plot("Training text", "steps", "bits per byte", curves)]
        gaps = [self._gap(variant, base) for variant in self.present if variant != base]
        if any(gap.x for gap in gaps):
            plots.append(Plot(f"The same less that of '{base}'", "steps", "bits per byte", gaps))
        return plots

    def _gap(self, variant: str, base: str) -> Line:
        """Seed by seed, since variants with one seed read the same rows in the same order."""
        found: list[Row] = []
        for seed in sorted({row["seed"] for row in table.of(self._rows, variant=variant)}):
            mine, other = (
                {
                    row["step"]: row["bits_per_byte"]
                    for row in table.of(self._rows, variant=v, seed=seed)
                    if "step" in row
                }
                for v in (variant, base)
            )
            steps = [step for step in mine if step in other]
            for first in range(len(steps) - SMOOTHED + 1):
                near = steps[first : first + SMOOTHED]
                gap = sum(mine[step] - other[step] for step in near) / SMOOTHED
                found.append({"seed": seed, "step": near[SMOOTHED // 2], "gap": gap})
        return table.line(variant, found, "step", "gap")
