"""Seeing inside: what a model does with a text, computed from the model as it is (docs/inspection.md)."""

from statespan.inspection.observation import Observation, observe
from statespan.inspection.report import inspect_text
from statespan.inspection.selection import Selection, hidden_attention, memory_lengths, selection_of
from statespan.inspection.tokens import TokenView, token_view
from statespan.inspection.views import LayerView, layer_view

__all__ = [
    "LayerView",
    "Observation",
    "Selection",
    "TokenView",
    "hidden_attention",
    "inspect_text",
    "layer_view",
    "memory_lengths",
    "observe",
    "selection_of",
    "token_view",
]
