"""An inspection as files: pictures, one page that holds them all, and the figures as JSON."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from statespan.checkpoints.atomic_save import replacing
from statespan.errors import UserError
from statespan.generation.prompts import read_prompts
from statespan.inspection import figures
from statespan.inspection.observation import check_layers, log_probabilities, observe
from statespan.inspection.page import write_page
from statespan.inspection.tokens import token_texts
from statespan.inspection.views import LayerView, layer_view
from statespan.models.language_model import LanguageModel

MOST_TOKENS = 1024  # of a text: pictures have a pixel for each pair of tokens
PAGE, DATA = "index.html", "inspection.json"


@dataclass(frozen=True)
class LayerSummary:
    """One layer's figures, small enough to keep for all layers."""

    index: int
    kind: str
    dt: Tensor | None  # [t], mean over channels
    memory: Tensor | None  # [c m]
    experts: Tensor | None  # [t k]
    note: str

    @classmethod
    def of(cls, view: LayerView) -> "LayerSummary":
        """The summary of a view."""
        dt = None if view.dt is None else view.dt.mean(1)
        return cls(view.index, str(view.spec), dt, view.memory, view.experts, view.note)


@dataclass(frozen=True)
class Inspection:
    """What `inspect_text` found and wrote."""

    title: str
    ids: tuple[int, ...]
    texts: tuple[str, ...]  # what each token adds to the text
    logprobs: Tensor  # [t] float64, nats; NaN for the first
    layers: tuple[LayerSummary, ...]
    num_experts: int
    pictures: dict[str, str] = field(default_factory=dict[str, str])  # file: what it shows

    @property
    def bits_per_token(self) -> float:
        """Mean of -log2 p over all tokens but the first."""
        return float(-self.logprobs[1:].mean()) / math.log(2)

    def summary(self) -> str:
        """Length and surprise in a line."""
        tokens = figures.counted(len(self.ids))
        return tokens if len(self.ids) == 1 else f"{tokens}, {self.bits_per_token:.3f} bits a token"

    def table(self) -> list[tuple[str, ...]]:
        """A heading and a row a layer."""
        return [("layer", "kind", "mean dt", "memory: median", "longest", "experts used"), *map(_row, self.layers)]


def inspect_text(
    model: LanguageModel,
    text: str | Sequence[int],
    folder: str | Path,
    *,
    layers: Sequence[int] | None = None,
    num_channels: int = 64,
    title: str = "",
) -> Inspection:
    """Draw what a model does with a text, and write pictures, a page (index.html) and inspection.json to a folder.

    The files of an earlier inspection there are replaced, all at once; other files of the folder stay.

    Args:
        model: of any family.
        text: 1 to 1,024 tokens; text, or token ids.
        folder: made if it does not exist.
        layers: which layers are looked into; None: all.
        num_channels: how many channels or heads the mean of a layer's hidden attention takes.
        title: the model's name, for the page.
    Returns:
        The figures that the page shows.
    Raises:
        UserError: the text is empty or too long, a layer does not exist, or the folder cannot be written.

    Example:
        >>> import statespan, tempfile
        >>> model = statespan.build("jamba-tiny")
        >>> with tempfile.TemporaryDirectory() as folder:  # doctest: +SKIP
        ...     inspect_text(model, [1, 2, 3], folder).bits_per_token
    """
    ids = _read(model, text)
    chosen = list(range(len(model.layers))) if layers is None else sorted(set(layers))
    check_layers(model, chosen)
    if num_channels < 1:
        raise UserError(f"num_channels must be at least 1, got {num_channels}")
    try:
        with replacing(Path(folder), _is_ours) as staging:
            return _write(model, ids, staging, chosen, num_channels, title)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{folder}: the inspection cannot be written there: {reason}; name another folder") from None


def _read(model: LanguageModel, text: str | Sequence[int]) -> list[int]:
    if len(text) == 0:
        raise UserError("the text is empty; give at least one token")
    ids = read_prompts(model, text, tokenizer=model.tokenizer, attention_mask=None, continues=False)[0]
    if len(ids) > MOST_TOKENS:
        raise UserError(f"the text has {len(ids)} tokens and an inspection takes at most {MOST_TOKENS}; give a part")
    return ids


def _is_ours(name: str) -> bool:
    picture = name.endswith(".png") and name.startswith(("layer_", "dt.", "memory.", "experts.", "logprobs."))
    return picture or name in (PAGE, DATA)


def _write(
    model: LanguageModel, ids: list[int], folder: Path, layers: list[int], num_channels: int, title: str
) -> Inspection:
    observation = observe(model, ids, layers)
    texts = [f"<{i}>" for i in ids] if model.tokenizer is None else token_texts(model.tokenizer, ids)
    pictures: dict[str, str] = {}
    summaries: list[LayerSummary] = []
    for index in layers:
        view = layer_view(model, observation, index, num_channels)
        summaries.append(LayerSummary.of(view))
        if view.mixing is not None or view.scores is not None:
            pictures[f"layer_{index:03}.png"] = f"Layer {index}, {view.spec}"
            figures.draw_layer(folder / f"layer_{index:03}.png", view, texts)
    logprobs = log_probabilities(model, observation)
    inspection = Inspection(title, tuple(ids), tuple(texts), logprobs, tuple(summaries), model.config.moe.num_experts)
    inspection.pictures.update(_overviews(inspection, folder) | pictures)
    (folder / DATA).write_text(json.dumps(as_json(inspection)), encoding="utf-8")
    write_page(folder / PAGE, as_json(inspection), inspection.pictures)
    return inspection


def _overviews(inspection: Inspection, folder: Path) -> dict[str, str]:
    """Draw the pictures that span layers; each one's file and what it shows."""
    texts, drawn = inspection.texts, dict[str, str]()
    if len(texts) > 1:  # nothing comes before the first token
        drawn["logprobs.png"] = "Surprise of each token, in bits"
        figures.draw_logprobs(folder / "logprobs.png", inspection.logprobs, texts)
    if dt := {layer.index: layer.dt for layer in inspection.layers if layer.dt is not None}:
        drawn["dt.png"] = "Mean step size dt of each token and layer"
        figures.draw_dt(folder / "dt.png", dt, texts)
    if memory := {layer.index: layer.memory for layer in inspection.layers if layer.memory is not None}:
        drawn["memory.png"] = "How long the states of each layer last"
        figures.draw_memory(folder / "memory.png", memory, len(texts))
    if experts := {layer.index: layer.experts[:, 0] for layer in inspection.layers if layer.experts is not None}:
        drawn["experts.png"] = "The first expert of each token and layer"
        figures.draw_experts(folder / "experts.png", experts, inspection.num_experts, texts)
    return drawn


def as_json(inspection: Inspection) -> dict[str, Any]:
    """The figures as JSON values; null for the first token's log-probability and what a layer does not have."""
    return {
        "title": inspection.title,
        "ids": inspection.ids,
        "texts": inspection.texts,
        "logprobs": [None, *_rounded(inspection.logprobs[1:])],
        "bits_per_token": _rounded(torch.tensor([inspection.bits_per_token]))[0],
        "num_experts": inspection.num_experts,
        "layers": [_layer_json(layer) for layer in inspection.layers],
    }


def _row(layer: LayerSummary) -> tuple[str, ...]:
    dt = "" if layer.dt is None else f"{float(layer.dt.mean()):.3g}"
    memory = layer.memory
    median, longest = ("", "") if memory is None else (f"{float(x):.3g}" for x in (memory.median(), memory.max()))
    experts = "" if layer.experts is None else str(len(layer.experts.unique()))
    return (str(layer.index), layer.kind, dt, median, longest, experts)


def _layer_json(layer: LayerSummary) -> dict[str, Any]:
    memory = None
    if layer.memory is not None:
        values = layer.memory.flatten().clamp(max=1e9)
        memory = dict(
            zip(("min", "median", "max"), _rounded(values.quantile(values.new_tensor([0, 0.5, 1]))), strict=True)
        )
    return {
        "index": layer.index,
        "kind": layer.kind,
        "dt": None if layer.dt is None else _rounded(layer.dt),
        "memory": memory,
        "experts": None if layer.experts is None else layer.experts.tolist(),
        "note": layer.note,
    }


def _rounded(values: Tensor) -> list[float | None]:
    """Four digits; null for what JSON has no number for."""
    return [float(f"{value:.4g}") if math.isfinite(value) else None for value in values.tolist()]
