"""What the serving benchmarks share: the model, conversations, and the memory of the process."""

import os
import random
import resource
from dataclasses import dataclass, field
from pathlib import Path

import torch

import statespan
from statespan.generation import GenerationOptions
from statespan.models.language_model import LanguageModel
from statespan.serving.request import Request


def served_model(path: str | None) -> LanguageModel:
    """The checkpoint at `path`, or the demo's model with random weights, which give as much work."""
    model = statespan.build("jamba-demo", seed=0) if path is None else statespan.load(path)
    return model.requires_grad_(False).eval()


def resident_bytes() -> int:
    """Memory of this process now; where the system does not tell, the most so far."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return pages * os.sysconf("SC_PAGE_SIZE")


def options_of(request: Request, index: int = 0) -> dict[str, object]:
    """What to pass to `generate` for the same tokens."""
    options = request.options
    seed = None if options.seed is None else options.seed + index
    return {
        "temperature": options.temperature,
        "top_p": options.top_p,
        "max_new_tokens": options.max_new_tokens,
        "seed": seed,
        "ignore_eos": options.ignore_eos,
    }


@dataclass
class Conversation:
    """Turns that each begin with all that was said before, as chats do; a few topics begin alike."""

    rng: random.Random
    vocab_size: int
    longest: int = 600  # tokens, then a new conversation begins
    tokens: list[int] = field(default_factory=list[int])

    def next_request(self, name: str, new_tokens: int) -> Request:
        """A turn of 1 to 60 tokens, and the wish for up to `new_tokens` of reply."""
        rng = self.rng
        if not self.tokens or len(self.tokens) > self.longest:
            topic = random.Random(rng.randrange(8))
            self.tokens = [topic.randrange(self.vocab_size) for _ in range(topic.randrange(40, 160))]
        self.tokens += [rng.randrange(self.vocab_size) for _ in range(rng.randrange(1, 61))]
        options = GenerationOptions(
            max_new_tokens=rng.randrange(1, new_tokens + 1),
            temperature=rng.choice([0.0, 0.7, 1.0]),
            top_p=rng.choice([None, 0.9]),
            seed=rng.randrange(2**40),
            ignore_eos=True,
        )
        return Request(tuple(self.tokens), options, id=name, num_samples=rng.choice([1, 1, 1, 1, 2]))


def alone(model: LanguageModel, request: Request, index: int = 0) -> tuple[int, ...]:
    """The tokens that `generate` gives."""
    with torch.inference_mode():
        return statespan.generate(model, list(request.prompt), **options_of(request, index)).token_ids
