"""The layer list: the only source of a model's depth and of what each layer is.

Three notations are read, all into `tuple[LayerSpec, ...]`:
  list      ["mamba1+mlp", "attention+moe", "mlp"]          what config files hold
  text      "M+M*-"  Mamba-2-Hybrid (arXiv 2406.07887): one sub-layer a character
  periods   Jamba (arXiv 2403.19887): attention where i % period == offset, experts likewise
"""

from dataclasses import dataclass
from typing import Literal, get_args

from statespan.errors import UnknownName, UserError

MixerName = Literal["mamba1", "mamba2", "attention", "s4", "s4d", "lssl", "s6", "lstm", "gru"]
FeedForwardName = Literal["mlp", "moe"]
MIXERS: tuple[str, ...] = get_args(MixerName)
FEED_FORWARDS: tuple[str, ...] = get_args(FeedForwardName)

CHARACTERS = {
    "M": "mamba2",
    "m": "mamba1",
    "*": "attention",
    "S": "s4",
    "D": "s4d",
    "+": "mlp",
    "-": "mlp",
    "E": "moe",
}


@dataclass(frozen=True)
class LayerSpec:
    """One layer: `h += mixer(norm(h))`, then `h += feed_forward(norm(h))`; either half may be absent."""

    mixer: MixerName | None = None
    feed_forward: FeedForwardName | None = None

    def __post_init__(self) -> None:
        if self.mixer is None and self.feed_forward is None:
            raise UserError("a layer needs a mixer, a feed-forward, or both")

    @classmethod
    def from_text(cls, text: str) -> "LayerSpec":
        """Read "mixer", "feed_forward" or "mixer+feed_forward", such as "mamba1+moe"."""
        first, _, second = text.partition("+")
        for part in filter(None, (first, second)):
            if part not in MIXERS + FEED_FORWARDS:
                raise UnknownName("layer type", part, MIXERS + FEED_FORWARDS)
        if first in FEED_FORWARDS and not second:
            return cls(None, first)  # type: ignore[arg-type]  # membership was checked above
        if first not in MIXERS or (second and second not in FEED_FORWARDS):
            raise UserError(f"layer {text!r}: write mixer, feed-forward, or mixer+feed-forward, such as 'mamba1+moe'")
        return cls(first, second or None)  # type: ignore[arg-type]  # membership was checked above

    def __str__(self) -> str:
        return "+".join(part for part in (self.mixer, self.feed_forward) if part)


def pattern_from_text(text: str) -> tuple[LayerSpec, ...]:
    """One layer a character: M mamba2, m mamba1, * attention, S s4, D s4d, + or - MLP, E experts; spaces are free."""
    layers = []
    for position, character in enumerate(text):
        if character.isspace():
            continue
        if character not in CHARACTERS:
            known = ", ".join(f"{key} {name}" for key, name in CHARACTERS.items())
            raise UserError(f"layer pattern {text!r}: {character!r} at {position} is none of: {known}")
        layers.append(LayerSpec.from_text(CHARACTERS[character]))
    if not layers:
        raise UserError("layer pattern is empty; write for example 'M+M*'")
    return tuple(layers)


def pattern_from_periods(
    num_layers: int,
    *,
    mixer: MixerName = "mamba1",
    feed_forward: FeedForwardName | None = "mlp",
    attention_period: int | None = None,
    attention_offset: int = 0,
    expert_period: int | None = None,
    expert_offset: int = 0,
) -> tuple[LayerSpec, ...]:
    """Layer i has attention where `i % attention_period == attention_offset`, and experts likewise."""
    for name, period, offset in (
        ("attention", attention_period, attention_offset),
        ("expert", expert_period, expert_offset),
    ):
        if period is not None and not 0 <= offset < period:
            raise UserError(f"{name} offset {offset} must be at least 0 and below the period {period}")

    def hits(index: int, period: int | None, offset: int) -> bool:
        return period is not None and index % period == offset

    return tuple(
        LayerSpec(
            "attention" if hits(i, attention_period, attention_offset) else mixer,
            "moe" if hits(i, expert_period, expert_offset) else feed_forward,
        )
        for i in range(num_layers)
    )
