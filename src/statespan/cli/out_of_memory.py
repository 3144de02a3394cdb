"""What the command line says where memory runs out: one line, and what to do."""

import re

# What each command can do with less; the others have a smaller model.
LESS = {
    "train": "run.accumulation_steps=2 takes half the rows at a time, run.activation_checkpointing=true keeps less",
    "generate": "try --quantize int8, --dtype bfloat16 or a shorter prompt",
    "serve": "try --quantize int8, --dtype bfloat16, or less for --cache-bytes, --max-rows and --prefill-tokens",
    "lab": "try fewer --jobs, or smaller sizes as key=value",
    "inspect": "try --quantize int8 or a shorter text",
}


def out_of_memory(error: RuntimeError, command: str = "") -> str | None:
    """The line for what PyTorch or a driver raised; None for another error."""
    text = str(error)
    on_host = "DefaultCPUAllocator" in text or "Storage size calculation overflowed" in text
    if not (on_host or "out of memory" in text.lower()):
        return None
    asked = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", text)
    wanted = f" (it asked for {asked[1]} more)" if asked else ""
    place = "the computer" if on_host else "the GPU"
    return f"{place} is out of memory{wanted}; {LESS.get(command, 'try a smaller model or shorter inputs')}"
