"""`statespan inspect`: layers, parameters, FLOPs and memory of a preset or checkpoint, without building it."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from statespan.cli.arguments import Command
from statespan.cli.checkpoint_path import checkpoint_path
from statespan.cli.table import print_table
from statespan.errors import UnknownName

if TYPE_CHECKING:
    from statespan.models.config import ModelConfig

VALUE_BYTES = {"bfloat16": 2, "float32": 4}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", help="a preset's name or a checkpoint; without it the presets are listed"
    )
    parser.add_argument(
        "--context",
        type=context_lengths,
        default=(4096, 32 * 1024, 256 * 1024),
        metavar="N,N",
        help="tokens of a sequence, K for 1024 (default: 4K,32K,256K)",
    )
    parser.add_argument(
        "--cache-dtype", choices=tuple(VALUE_BYTES), default="bfloat16", help="of cached values (default: %(default)s)"
    )


def context_lengths(text: str) -> tuple[int, ...]:
    """ "4096,256K" as numbers of tokens, for `type=`."""
    lengths = tuple(_tokens(part) for part in text.split(","))
    if min(lengths) < 1:
        raise argparse.ArgumentTypeError(f"a context has at least 1 token, got {min(lengths)}")
    return lengths


def _tokens(text: str) -> int:
    kilo = text[-1:] in ("k", "K")
    try:
        return int(text[:-1]) * 1024 if kilo else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no length; write tokens, such as 4096,256K") from None


def run(arguments: argparse.Namespace) -> None:
    from statespan.models.presets import presets
    from statespan.models.summary import print_summary

    if arguments.model is None:
        print_table([("preset", "what it is"), *presets().items()])
        return
    config = _config(arguments.model)
    print_summary(config, arguments.context, title=arguments.model, value_bytes=VALUE_BYTES[arguments.cache_dtype])


def _config(name: str) -> "ModelConfig":
    from statespan.checkpoints.identify import identify
    from statespan.models.presets import PRESETS, preset

    if name in PRESETS:
        return preset(name)
    if not Path(name).exists():
        raise UnknownName("preset or checkpoint", name, PRESETS)
    return identify(checkpoint_path(name)).read_config()


COMMAND = Command(
    "Layers, parameters (total and active), FLOPs per token, and KV-cache and state bytes per sequence.",
    "statespan inspect jamba-v0.1 --context 4096,256K",
    add_arguments,
    run,
)
