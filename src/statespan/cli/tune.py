"""`statespan tune`: the launch parameters of the Triton kernels, timed on the GPU that is here."""

import argparse

from statespan.cli.arguments import Command
from statespan.errors import UnknownName, UserError
from statespan.machine import usable_device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", metavar="NAME", help="tune this op only (default: all that can be)")
    parser.add_argument("--device", default="cuda", help="the GPU to time on (default: %(default)s)")


def run(arguments: argparse.Namespace) -> None:
    from statespan.ops.dispatch import BACKENDS
    from statespan.ops.tuning import MODULES, user_path
    from statespan.ops.tuning.tune import compile_all, tune

    if arguments.op is not None and arguments.op not in MODULES:
        raise UnknownName("op that can be tuned", arguments.op, MODULES)
    device = usable_device(arguments.device, "tuning needs a GPU")
    if (reason := BACKENDS["triton"].why_not(device, ())) is not None:
        raise UserError(f"nothing to tune on {device}: the triton backend cannot run, {reason}")
    print(f"{compile_all(arguments.op, device)} candidates are compiled", flush=True)
    for name, size, parameters, before, after in tune(arguments.op, device):
        print(f"{name:<32} {size:>6}  {before:9.4f} ms -> {after:9.4f} ms  {parameters}", flush=True)
    print(f"written to {user_path()}; remove the file to go back to the shipped table")


COMMAND = Command(
    "Time the launch parameters of the Triton kernels on the GPU that is here, and keep the best for this user.",
    "statespan tune --op rms_norm",
    add_arguments,
    run,
)
