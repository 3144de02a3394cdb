"""`statespan inspect`: a model's layers and costs without building it, or with --text what it does with a text."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from statespan.cli.arguments import Command, positive_int
from statespan.cli.checkpoint_path import checkpoint_path
from statespan.cli.table import print_table
from statespan.errors import UnknownName, UserError
from statespan.machine import usable_device

if TYPE_CHECKING:
    from statespan.models.config import ModelConfig

VALUE_BYTES = {"bfloat16": 2, "float32": 4}
CONTEXT = (4096, 32 * 1024, 256 * 1024)
OUT, CHANNELS = "inspection-output", 64
MOST_LAYERS = 9999  # no model has as many
OF_TEXT, OF_COSTS = ("output", "layers", "channels", "device"), ("context", "cache_dtype")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", help="a preset's name or a checkpoint; without it the presets are listed"
    )
    parser.add_argument(
        "--context",
        type=context_lengths,
        metavar="N,N",
        help="tokens of a sequence, K for 1024 (default: 4K,32K,256K)",
    )
    parser.add_argument("--cache-dtype", choices=tuple(VALUE_BYTES), help="of cached values (default: bfloat16)")
    parser.add_argument(
        "--quantize", choices=("int8", "experts_int8", "int4"), help="the weights, counted so or loaded so"
    )
    inside = parser.add_argument_group("seeing inside (MODEL is a checkpoint)")
    inside.add_argument("--text", metavar="TEXT", help="draw what the model does with TEXT; - reads it from stdin")
    inside.add_argument("--output", metavar="FOLDER", help=f"for pictures and index.html (default: {OUT})")
    inside.add_argument("--layers", type=layer_numbers, metavar="N,N-N", help="which layers (default: all)")
    inside.add_argument(
        "--channels", type=positive_int, metavar="N", help=f"in the mean of the hidden attention (default: {CHANNELS})"
    )
    inside.add_argument("--device", help="cpu, cuda, mps (default: cpu)")


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


def layer_numbers(text: str) -> tuple[int, ...]:
    """ "0,4-6" as layers, for `type=`."""
    numbers: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        last = last or first
        if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last) <= MOST_LAYERS):
            raise argparse.ArgumentTypeError(f"{part!r} is no layer; write layers, such as 0,4-6")
        numbers += range(int(first), int(last) + 1)
    return tuple(numbers)


def run(arguments: argparse.Namespace) -> None:
    from statespan.models.presets import presets
    from statespan.models.quantize import weight_bytes
    from statespan.models.summary import bytes_text, print_summary

    if arguments.text is not None:
        _look_inside(arguments)
        return
    _refuse(arguments, OF_TEXT, "goes with --text")
    if arguments.model is None:
        _refuse(arguments, ("quantize",), "needs MODEL")
        print_table([("preset", "what it is"), *presets().items()])
        return
    config, value_bytes = _config(arguments.model), VALUE_BYTES[arguments.cache_dtype or "bfloat16"]
    print_summary(config, arguments.context or CONTEXT, title=arguments.model, value_bytes=value_bytes)
    if arguments.quantize is not None:
        full, small = bytes_text(weight_bytes(config)), bytes_text(weight_bytes(config, arguments.quantize))
        print(f"\nweights: {full} in bfloat16, {small} as {arguments.quantize}")


def _refuse(arguments: argparse.Namespace, names: tuple[str, ...], reason: str) -> None:
    """UserError for an option that would be dropped in silence."""
    for name in names:
        if getattr(arguments, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} {reason}; see statespan inspect --help")


def _look_inside(arguments: argparse.Namespace) -> None:
    import statespan
    from statespan.cli.stdin import read_stdin
    from statespan.inspection import inspect_text

    _refuse(arguments, OF_COSTS, "does not go with --text")
    if arguments.model is None:
        raise UserError("--text needs MODEL, the folder of a checkpoint; see statespan inspect --help")
    text = read_stdin() if arguments.text == "-" else arguments.text
    path = checkpoint_path(arguments.model)
    device = usable_device(arguments.device or "cpu")
    model = statespan.load(path, device=device, quantize=arguments.quantize)
    folder, channels = Path(arguments.output or OUT), arguments.channels or CHANNELS
    found = inspect_text(model, text, folder, layers=arguments.layers, num_channels=channels, title=arguments.model)
    print_table(found.table())
    print(found.summary())
    print(f"{len(found.pictures)} pictures and the page: {folder / 'index.html'}")


def _config(name: str) -> "ModelConfig":
    from statespan.checkpoints.identify import download_hint, identify
    from statespan.models.presets import PRESETS, preset

    if name in PRESETS:
        return preset(name)
    if not Path(name).exists():
        if Path(name).name != name:
            hint = download_hint(Path(name))
            raise UserError(f"{name} does not exist; give a preset's name or the folder of a checkpoint{hint}")
        raise UnknownName("preset or checkpoint", name, PRESETS)
    return identify(checkpoint_path(name)).read_config()


COMMAND = Command(
    "Layers, parameters (total and active), FLOPs per token, and KV-cache and state bytes per sequence; or, with\n"
    "--text, what a checkpoint does with a text: step sizes, memory, hidden attention, experts, log-probabilities.",
    "statespan inspect demo-output/checkpoint --text 'def main(argv):' --output inspection-output",
    add_arguments,
    run,
)
