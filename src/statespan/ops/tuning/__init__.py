"""Block sizes as data: what a kernel is launched with on this kind of GPU, and what else may be tried.

`table.json` beside this file is shipped; `statespan tune` writes a table of the same form to the cache directory, whose
rows come first. docs/tuning.md says how an op joins.
"""

import json
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from itertools import product
from pathlib import Path

import torch

from statespan.errors import first_line
from statespan.ops.kernel_cache import cache_directory
from statespan.ops.notices import say_once

SHIPPED = Path(__file__).with_name("table.json")
ANY = "any"  # of a kind of GPU or a size without a row

Parameters = Mapping[str, int]
# {tunable: {kind of GPU: {size: parameters}}}
Table = dict[str, dict[str, dict[str, dict[str, int]]]]

# Each has TUNABLES. Loaded when they are to be tuned.
MODULES = {
    op: f"statespan.ops.{op}.triton_backend"
    for op in (
        "rms_norm",
        "causal_conv1d",
        "state_update",
        "linear_cross_entropy",
        "selective_scan",
        "ssd",
        "grouped_mlp",
    )
}


class Tunable:
    """The launch parameters of a kernel, looked up by the kind of GPU and one size, the one that matters most.

    Args:
        name: of its rows in the table, "op.kernel".
        sizes: those worth a row.
        trial: from a device and a size, what is to be timed.
        choices: what each parameter may be.
    """

    def __init__(
        self,
        name: str,
        sizes: Sequence[int],
        trial: Callable[[torch.device, int], Callable[[], object]],
        **choices: Sequence[int],
    ) -> None:
        self.name, self.sizes, self.trial, self.choices = name, sizes, trial, choices
        self._forced: Parameters | None = None

    def best(self, device: torch.device, size: int) -> Parameters:
        """The parameters of the table's row for the size, or for the nearest one."""
        return self._forced or _best(self.name, device, size)

    def candidates(self) -> Iterator[Parameters]:
        """Every combination of choices."""
        for values in product(*self.choices.values()):
            yield dict(zip(self.choices, values, strict=True))

    @contextmanager
    def forced(self, **parameters: int) -> Generator[None]:
        """`best` gives these parameters, whatever the table says. For tuning and tests; not for several threads."""
        self._forced = parameters
        try:
            yield
        finally:
            self._forced = None


def tunables(op: str | None = None) -> list[Tunable]:
    """Those of an op, or all."""
    names = MODULES if op is None else {op: MODULES[op]}
    return [tunable for module in names.values() for tunable in import_module(module).TUNABLES]


def kind_of(device: torch.device) -> str:
    """The name of a kind of GPU in the table."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ANY


@cache
def _best(name: str, device: torch.device, size: int) -> Parameters:
    for table in (user_table(), shipped_table()):
        rows = table.get(name, {})
        for kind in (kind_of(device), ANY):
            if found := rows.get(kind):
                known = [int(key) for key in found if key != ANY]
                near = min(known, key=lambda other: abs(math.log(other / max(size, 1))), default=None)
                return found[ANY if near is None else str(near)]
    raise KeyError(f"{SHIPPED.name} has no row of {name}")


@cache
def shipped_table() -> Table:
    """The table that came with the package."""
    return json.loads(SHIPPED.read_text())


@cache
def user_table() -> Table:
    """What `statespan tune` found on this machine; empty where it never ran. A broken file is told and ignored."""
    path = user_path()
    if path is None or not path.exists():
        return {}
    try:
        table: Table = json.loads(path.read_text())
        _check(table)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        say_once("tuning", f"{path} is not used ({first_line(error)}); run statespan tune to write it again")
        return {}
    return table


def table_in_use(device: torch.device) -> str:
    """In words, where the parameters for a device come from."""
    kind = kind_of(device)
    tuned, shipped = (sum(kind in kinds for kinds in table.values()) for table in (user_table(), shipped_table()))
    if tuned:
        return f"{user_path()}, for {tuned} kernels on {kind}; the shipped table for the others"
    return f"the shipped table, {shipped} of its kernels tuned for {kind}; statespan tune makes one for this machine"


def user_path() -> Path | None:
    """Where the user's table is; None where there can be no folder."""
    directory = cache_directory()
    return directory / "tuning.json" if directory else None


def _check(table: Table) -> None:
    """Raise ValueError unless the rows name the parameters, in whole numbers, that the shipped ones name."""
    for name, kinds in table.items():
        shipped = next(iter(shipped_table()[name][ANY].values())) if name in shipped_table() else None
        if shipped is None:
            raise ValueError(f"it has rows of {name}, which this release does not know")
        for size, row in ((size, row) for rows in kinds.values() for size, row in rows.items()):
            whole = all(isinstance(value, int) and value > 0 for value in row.values())
            if row.keys() != shipped.keys() or not whole or not (size == ANY or int(size) > 0):
                raise ValueError(f"its row {size} of {name} is {row}")


def forget() -> None:
    """Read the tables anew at the next look-up."""
    for function in (_best, shipped_table, user_table):
        function.cache_clear()
