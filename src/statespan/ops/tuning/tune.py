"""Timing the candidates of the tunables on a GPU, and keeping the best."""

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from multiprocessing import get_context
from typing import Any

import torch

from statespan.errors import BackendUnavailable, UserError
from statespan.ops import tuning
from statespan.ops.kernel_cache import store

WORTH = 0.98  # of the present time: a gain below two hundredths is noise
PROCESSES = 16  # that compile at once, at the most
UNUSABLE = (BackendUnavailable, torch.OutOfMemoryError)  # a candidate that does not compile or fit
Timer = Callable[[Callable[[], object]], float]


def compile_all(op: str | None, device: torch.device) -> int:
    """Compile the candidates of an op's tunables, or of all, in processes side by side, and say how many there are.

    Timing then finds them on disk. What a process has no room for on the GPU is compiled when it is timed.
    """
    jobs = [
        (op, tunable.name, size, tuple(candidate.items()), device)
        for tunable in tuning.tunables(op)
        for size in tunable.sizes
        for candidate in tunable.candidates()
    ]
    processes = min(PROCESSES, os.cpu_count() or 1)
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        list(pool.map(_launch, *zip(*jobs, strict=True), chunksize=3))
    return len(jobs)


def _launch(
    op: str | None, name: str, size: int, parameters: tuple[tuple[str, int], ...], device: torch.device
) -> None:
    try:
        tunable, run = _trial(op, name, size, device)
        with tunable.forced(**dict(parameters)):
            run()
    except UNUSABLE:
        pass  # which timing finds out as well


@lru_cache(maxsize=1)
def _trial(op: str | None, name: str, size: int, device: torch.device) -> tuple[tuning.Tunable, Callable[[], object]]:
    tunable = next(known for known in tuning.tunables(op) if known.name == name)
    return tunable, tunable.trial(device, size)


def tune(
    op: str | None, device: torch.device, timer: Timer | None = None
) -> Iterator[tuple[str, int, str, float, float]]:
    """Time every candidate of an op's tunables, or of all, and write what is faster to the user's table.

    A candidate that does not fit the GPU is passed over. The table is written after each row, in one piece.

    Yields:
        Name, size, the parameters in words, and milliseconds with the parameters so far and with the best ones.
    """
    for tunable in tuning.tunables(op):
        for size, present in [(size, dict(tunable.best(device, size))) for size in tunable.sizes]:
            run = tunable.trial(device, size)
            times = {tuple(present.items()): _time(tunable, present, run, timer or _milliseconds)}
            for candidate in tunable.candidates():
                times[tuple(candidate.items())] = _time(tunable, candidate, run, timer or _milliseconds)
            before, best = times[tuple(present.items())], min(times, key=lambda row: times[row])
            chosen = dict(best) if times[best] < WORTH * before else present
            _keep(tunable.name, tuning.kind_of(device), size, chosen)
            words = " ".join(f"{name}={value}" for name, value in chosen.items())
            yield tunable.name, size, words, before, times[tuple(chosen.items())]


def _time(tunable: tuning.Tunable, parameters: tuning.Parameters, run: Callable[[], object], timer: Timer) -> float:
    with tunable.forced(**parameters):
        try:
            return timer(run)
        except UNUSABLE:
            return float("inf")


def _milliseconds(run: Callable[[], object]) -> float:
    from triton.testing import do_bench  # where there is a GPU to tune

    bench: Any = do_bench
    return bench(run, warmup=5, rep=30, return_mode="median")


def _keep(name: str, kind: str, size: int, parameters: dict[str, int]) -> None:
    path = tuning.user_path()
    if path is None:
        raise UserError("there is no folder to write the table to; set NUMBA_CACHE_DIR to one")
    table = tuning.user_table()
    table.setdefault(name, {}).setdefault(kind, {})[str(size)] = parameters
    store(path, json.dumps(table, indent=1).encode())
    tuning.forget()
    if tuning.user_table() != table:
        raise UserError(f"{path} cannot be written; free some room, or set NUMBA_CACHE_DIR to another folder")
