"""`statespan generate`: continue a prompt with a saved model, streaming the text to stdout."""

import argparse
import sys
import time
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from statespan.cli.arguments import Command, positive_int
from statespan.cli.checkpoint_path import checkpoint_path
from statespan.cli.stdin import read_stdin
from statespan.errors import UserError
from statespan.machine import usable_device

if TYPE_CHECKING:
    from statespan.generation import Speculation
    from statespan.models.language_model import LanguageModel


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder of a checkpoint or of a training run")
    parser.add_argument("prompt", metavar="PROMPT", help="text to continue; - reads it from stdin")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="default: %(default)s")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (default: %(default)s)")
    parser.add_argument("--top-k", type=int, metavar="K", help="sample among the K most likely tokens")
    parser.add_argument("--top-p", type=float, metavar="P", help="sample among the likeliest that hold P together")
    parser.add_argument("--min-p", type=float, metavar="P", help="drop tokens below P times the likeliest")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, metavar="R", help="1 is none (default)")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before TEXT; may be repeated")
    parser.add_argument("--ignore-eos", action="store_true", help="go on after the model's end token")
    parser.add_argument("--seed", type=int, help="of the samples (default: a new one each time)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, mps (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the weights (default: as stored)")
    parser.add_argument("--quantize", choices=("int8", "experts_int8", "int4"), help="the weights, while loading")
    faster = parser.add_argument_group(
        "speculative decoding: greedy text stays the same and samples as likely, sooner where drafts are often right"
    )
    faster.add_argument("--lookup", action="store_true", help="draft what followed earlier in the text")
    faster.add_argument("--draft-model", metavar="MODEL", help="draft by a smaller model, or a subword one for bytes")
    faster.add_argument("--num-drafts", type=positive_int, metavar="N", help="tokens drafted a step (default: 6)")


def run(arguments: argparse.Namespace) -> None:
    import statespan

    prompt = read_stdin() if arguments.prompt == "-" else arguments.prompt
    options, path = _options(arguments), checkpoint_path(arguments.model)
    device, dtype = usable_device(arguments.device), _dtype(arguments.dtype)
    model = statespan.load(path, device=device, dtype=dtype, quantize=arguments.quantize)
    speculation = _speculation(arguments, model)
    events = statespan.generate_stream(model, prompt, speculation=speculation, **options)
    start, first, count = time.perf_counter(), 0.0, 0
    try:
        for event in events:
            print(event.text, end="", flush=True)
            count += event.token_id is not None
            first = first or time.perf_counter()
    finally:
        print()
    _report(count, first - start, time.perf_counter() - first)


def _speculation(arguments: argparse.Namespace, model: "LanguageModel") -> "Speculation | None":
    import statespan
    from statespan.generation import DraftModel, PromptLookup, Speculation, SubwordDrafter

    if arguments.lookup and arguments.draft_model is not None:
        raise UserError("--lookup and --draft-model are two drafters; give one of them")
    if arguments.lookup:
        drafter = PromptLookup()
    elif arguments.draft_model is not None:
        path = checkpoint_path(arguments.draft_model)
        small = statespan.load(path, device=model.device, dtype=_dtype(arguments.dtype))
        same_tokens = small.config.vocab_size == model.config.vocab_size
        drafter = DraftModel(small) if same_tokens else SubwordDrafter(small)
    elif arguments.num_drafts is not None:
        raise UserError("--num-drafts goes with --lookup or --draft-model")
    else:
        return None
    return Speculation(drafter, num_drafts=arguments.num_drafts or 6)


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments that are options of generation, under the same names, checked before a model is loaded."""
    from statespan.generation.options import GenerationOptions

    given = vars(arguments) | {"stop": tuple(arguments.stop)}
    options: dict[str, Any] = {
        field.name: given[field.name] for field in fields(GenerationOptions) if field.name in given
    }
    GenerationOptions(**options)
    return options


def _dtype(name: str | None) -> Any:
    import torch

    return None if name is None else getattr(torch, name)


def _report(count: int, first_s: float, rest_s: float) -> None:
    """Tokens/s on stderr. The first token belongs to the prefill."""
    rate = f", then {(count - 1) / rest_s:.1f} tokens/s" if count > 1 else ""
    print(f"{count} tokens; the first after {first_s:.2f} s{rate}", file=sys.stderr)


COMMAND = Command(
    "Continue a prompt with a saved model. The text goes to stdout, the speed to stderr.",
    "statespan generate demo-output/checkpoint 'def main(' --temperature 0.8 --seed 1",
    add_arguments,
    run,
)
