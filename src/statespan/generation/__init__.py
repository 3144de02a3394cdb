"""Generation: prompts in, text out, over explicit state. What speculation needs is imported when it is used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from statespan.generation.batch import TokenLogprob
from statespan.generation.generate import Generation, Timing, generate, generate_stream
from statespan.generation.options import GenerationOptions
from statespan.generation.sampling import Sampling
from statespan.generation.state import GenerationState, load_state, save_state
from statespan.generation.streaming import StreamEvent

if TYPE_CHECKING:
    from statespan.generation.draft_model import DraftModel
    from statespan.generation.prompt_lookup import PromptLookup
    from statespan.generation.speculative import Speculation, SpeculationReport
    from statespan.generation.subword_drafter import SubwordDrafter

__all__ = [
    "DraftModel",
    "Generation",
    "GenerationOptions",
    "GenerationState",
    "PromptLookup",
    "Sampling",
    "Speculation",
    "SpeculationReport",
    "StreamEvent",
    "SubwordDrafter",
    "Timing",
    "TokenLogprob",
    "generate",
    "generate_stream",
    "load_state",
    "save_state",
]

_HOMES = {
    "DraftModel": "draft_model",
    "PromptLookup": "prompt_lookup",
    "Speculation": "speculative",
    "SpeculationReport": "speculative",
    "SubwordDrafter": "subword_drafter",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"statespan.generation.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'statespan.generation' has no attribute {name!r}")
