"""Generation: prompts in, text out, over explicit state."""

from statespan.generation.batch import TokenLogprob
from statespan.generation.generate import Generation, Timing, generate, generate_stream
from statespan.generation.options import GenerationOptions
from statespan.generation.sampling import Sampling
from statespan.generation.state import GenerationState, load_state, save_state
from statespan.generation.streaming import StreamEvent

__all__ = [
    "Generation",
    "GenerationOptions",
    "GenerationState",
    "Sampling",
    "StreamEvent",
    "Timing",
    "TokenLogprob",
    "generate",
    "generate_stream",
    "load_state",
    "save_state",
]
