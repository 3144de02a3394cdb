"""The options of `generate` and `generate_stream`: one frozen, checked dataclass."""

from dataclasses import dataclass

from statespan.errors import UserError
from statespan.generation.sampling import Sampling


@dataclass(frozen=True)
class GenerationOptions(Sampling):
    """What to generate and when to stop; the fields of `Sampling` say how each token is chosen."""

    max_new_tokens: int = 128
    stop: tuple[str, ...] | str = ()  # the text ends before the first of these strings
    stop_token_ids: tuple[int, ...] = ()  # end tokens besides the model's end tokens
    ignore_eos: bool = False  # go on after the model's end tokens
    seed: int | None = None  # of the first prompt, the next ones count up; None: from torch's global generator
    prefill_chunk_size: int | None = 2048  # prompt tokens a forward, which bounds the memory; None: all at once
    return_state: bool = False  # give the state with the last token
    logprobs: bool | int = False  # True: of the chosen tokens; n: also of the n most likely ones

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("max_new_tokens", 0), ("prefill_chunk_size", 1), ("logprobs", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name} must be at least {least}, got {value}")
        if "" in self.stop_strings:
            raise UserError("a stop string is empty; leave it out")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else self.stop

    @property
    def num_top(self) -> int:
        """How many of the most likely tokens are reported besides the chosen one."""
        return 0 if isinstance(self.logprobs, bool) else self.logprobs
