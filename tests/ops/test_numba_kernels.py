"""The ground of the CPU kernels: vectors and functions against float64, threads, forks, and the cache on the disk."""

import math
import os
import platform
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from statespan.ops.numba_kernels import Kernel, num_workers, scratch, threads
from statespan.ops.numba_kernels.host import vector_width

KERNELS = '''
from statespan.ops.numba_kernels.phases import wait_until
from statespan.ops.numba_kernels.special_functions import *
from statespan.ops.numba_kernels.vector import *

@jit
def functions(item, worker, x, y, size):
    """Row i of y: the i-th function of x."""
    for i in range(0, size, WIDTH):
        v, count = load_any(x, i, size - i, 0), size - i
        store_any(y, i, exp2(v), count, 0)
        store_any(y, size + i, exp(v), count, 0)
        store_any(y, 2 * size + i, softplus(v), count, 0)
        store_any(y, 3 * size + i, sigmoid(v), count, 0)
        store_any(y, 4 * size + i, silu(v), count, 0)
        store_any(y, 5 * size + i, exp2_minus_1(v)[1], count, 0)

@jit
def copy(item, worker, x, y, count, x_bf16, y_bf16):
    for i in range(0, count, WIDTH):
        store_any(y, i, load_any(x, i, count - i, x_bf16), count - i, y_bf16)

@jit
def arithmetic(item, worker, x, y, scalar):
    a, b = load(x, 0), load(x, WIDTH)
    store(y, 0, (a + b) * scalar - 2.0 / b)
    store(y, WIDTH, maximum(-a, absolute(b)) + minimum(a, square_root(absolute(b))))
    store(y, 2 * WIDTH, where_less(a, b, fma(a, b, zeros()), broadcast(scalar)))
    store(y, 3 * WIDTH, sums_of_vectors(x))
    store_scalar(y, 4 * WIDTH, horizontal_sum(a))

@jit
def count_items(item, worker, visits, workers):
    """Each item leaves a mark at its place, and each worker one at its own."""
    store_scalar(visits, item, load_scalar(visits, item) + 1.0)
    store_scalar(workers, worker, 1.0)

@jit
def two_phases(item, worker, finished, x, doubled, sums, count):
    """Items of the first phase double a value each, those of the second add up all of them."""
    if item < count:
        for i in range(200 * (item % 3)):  # unequal work
            store_scalar(doubled, item, load_scalar(x, item) + i)
        store_scalar(doubled, item, 2.0 * load_scalar(x, item))
    else:
        wait_until(finished, count)
        total = 0.0
        for i in range(count):
            total += load_scalar(doubled, i)
        store_scalar(sums, item - count, total)

@jit
def wait_for(item, worker, flag, seen, limit):
    """Spin until Python sets the flag, which it cannot while a kernel holds the GIL."""
    for i in range(limit):
        store_scalar(seen, 1, 1.0)  # may alias the flag, so that it is read each time
        if load_int64(flag, 0) != 0:
            store_scalar(seen, 0, 1.0)
            return

@jit
def may_raise(item, worker, x, step):
    for i in range(0, 8, step):
        store_scalar(x, i, 1.0)
'''


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory):
    """The name of an importable module with KERNELS, and a cache folder of its own."""
    folder = tmp_path_factory.mktemp("kernels")
    (folder / "cpu_probe.py").write_text(KERNELS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        patch.setenv("NUMBA_CACHE_DIR", str(folder / "cache"))
        yield "cpu_probe"


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter; a hang is a failure."""
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, **environment},
        check=False,
    )


# Vectors and functions.

INPUTS = torch.cat([torch.linspace(-150, 140, 4001), torch.linspace(-2, 2, 4001), torch.logspace(-30, 0, 99)])
INPUTS = torch.cat([INPUTS, -INPUTS[-99:], torch.tensor([0.0, 19.99, 20.01, -126.0, 127.5])])
EXACT = {  # in float64
    "exp2": torch.exp2,
    "exp": torch.exp,
    "softplus": lambda x: x.clamp(min=0) + torch.log1p(torch.exp(-x.abs())),
    "sigmoid": torch.sigmoid,
    "silu": lambda x: x * torch.sigmoid(x),
    "exp2_minus_1": lambda x: torch.expm1(x * math.log(2)),
}


def function_values(module: str, x: torch.Tensor) -> torch.Tensor:
    y = torch.empty(len(EXACT), len(x))
    Kernel(module, "functions", "x y size")(1, x=x, y=y, size=len(x))
    return y


LIMIT = {"exp2": 2e-7, "exp": 3e-7, "softplus": 4e-7, "sigmoid": 3e-7, "silu": 4e-7, "exp2_minus_1": 1e-6}  # relative
TINY = 2e-36  # below it some results are denormal, and counted as absolute errors


def test_functions_are_right_to_a_few_units_in_the_last_place(module: str) -> None:
    values = function_values(module, INPUTS)
    for value, (name, function) in zip(values, EXACT.items(), strict=True):
        x = INPUTS.double().clamp(max=127.0) if name == "exp2_minus_1" else INPUTS.double()
        exact = function(x)
        ordinary = (exact.abs() > TINY) & (exact.abs() < 3.4e38)
        assert ((value.double() - exact) / exact).abs()[ordinary].max() < LIMIT[name], name
        assert (value - exact).abs()[exact.abs() <= TINY].max() < TINY, name
        assert (value[exact >= 3.5e38] == math.inf).all(), name


def test_a_decay_of_almost_one_keeps_what_is_missing_to_one(module: str) -> None:
    x = -torch.logspace(-6, -2, 200)
    value, exact = function_values(module, x)[0].double(), torch.exp2(x.double())
    assert (value - exact).abs().max() <= 2**-25 * 1.01  # half a unit: the polynomial adds nothing to rounding
    assert function_values(module, torch.zeros(3))[0].tolist() == [1.0] * 3


def test_functions_of_infinities_and_nan(module: str) -> None:
    values = dict(zip(EXACT, function_values(module, torch.tensor([math.inf, -math.inf, math.nan])), strict=True))
    for name, low in {"exp2": 0.0, "exp": 0.0, "softplus": 0.0, "sigmoid": 0.0, "exp2_minus_1": -1.0}.items():
        high = {"sigmoid": 1.0, "exp2_minus_1": 2.0**127}.get(name, math.inf)
        assert values[name][:2].tolist() == [high, low], name
    assert torch.stack(list(values.values()))[:, 2].isnan().all()


def test_arithmetic_of_vectors(module: str) -> None:
    width = vector_width()
    x, y = torch.randn(width, width), torch.empty(4 * width + 1)
    Kernel(module, "arithmetic", "x y", "scalar")(1, x=x, y=y, scalar=0.3)
    a, b, scalar = x[0], x[1], torch.tensor(0.3)
    expected = [
        (a + b) * scalar - 2.0 / b,
        torch.maximum(-a, b.abs()) + torch.minimum(a, b.abs().sqrt()),
        torch.where(a < b, a * b, scalar),
        x.sum(1),
        a.sum().reshape(1),
    ]
    torch.testing.assert_close(y, torch.cat(expected))


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("y_dtype", [torch.float32, torch.bfloat16])
def test_loads_and_stores_of_any_length_round_as_pytorch_does(module: str, x_dtype, y_dtype) -> None:
    bits = torch.randint(-(2**31), 2**31 - 1, (64,), dtype=torch.int32)
    x = bits.view(torch.float32)
    x[x.abs() < 2e-38] = 0.0  # the processor's own rounding takes denormals for zero
    x[:6] = torch.tensor([math.nan, math.inf, -math.inf, 1.00390625, 1.01171875, 3.4e38])
    x = x.to(x_dtype)
    copy = Kernel(module, "copy", "x y count x_bf16 y_bf16")
    for count in (*range(1, 36), 64):
        y = torch.full((64,), 7.0, dtype=y_dtype)
        copy(1, x=x, y=y, count=count, x_bf16=x_dtype == torch.bfloat16, y_bf16=y_dtype == torch.bfloat16)
        torch.testing.assert_close(y[:count], x[:count].to(y_dtype), rtol=0, atol=0, equal_nan=True)
        assert (y[count:] == 7.0).all()


# Other processors than this one, as far as this one can run their instructions.

NARROWER = {"x86_64": [("haswell", "+avx,+avx2,+fma", 8), ("nehalem", "+sse4.2", 4)]}.get(platform.machine(), [])
SCAN = """
import torch
from statespan.ops import selective_scan
from statespan.ops.numba_kernels.host import vector_width
torch.manual_seed(0)
assert vector_width() == {width}
u, dt, z = torch.randn(3, 2, 37, 21).unbind()
inputs = [u, dt, -torch.rand(21, 5), *torch.randn(2, 2, 37, 3, 5).unbind(), torch.randn(21), z]
found = []
for backend, dtype in (("cpu", torch.float32), ("reference", torch.float64)):
    inputs = [value.detach().to(dtype).requires_grad_() for value in inputs]
    y, state = selective_scan(*inputs, return_final_state=True, discretization="{rule}", backend=backend)
    found.append([y, state, *torch.autograd.grad((y**2).sum() + state.sin().sum(), inputs)])
for value, exact in zip(*found):
    assert (value - exact).abs().max() < 2e-6 * exact.abs().max()
u, dt, A, B, C, D, z = (value.detach().float() for value in inputs)
y = selective_scan(u.bfloat16(), dt, A, B.bfloat16(), C, D, z)
assert torch.equal(y, selective_scan(u.bfloat16().float(), dt, A, B.bfloat16().float(), C, D, z).bfloat16())
ties = 1 + torch.arange(21) * 2.0**-8
y = selective_scan(torch.ones_like(u).bfloat16(), dt, A, B, 0 * C, ties)
assert torch.equal(y[0, 0], ties.bfloat16())
"""


@pytest.mark.parametrize(("cpu", "features", "width"), NARROWER)
def test_narrower_vectors_give_the_same_results(cpu: str, features: str, width: int) -> None:
    rule = "mamba" if width == 8 else "zoh"
    code = SCAN.format(width=width, rule=rule)
    run = run_python(code, NUMBA_CPU_NAME=cpu, NUMBA_CPU_FEATURES=features, NUMBA_CACHE_DIR="")
    assert run.returncode == 0, run.stderr


# Threads and processes.


@pytest.mark.parametrize("openmp", [True, False])
@pytest.mark.parametrize("workers", [1, 2, 3, 7])
def test_every_item_runs_once_on_at_most_as_many_workers(module: str, workers, openmp, monkeypatch) -> None:
    if not openmp:
        monkeypatch.setattr(threads, "_gomp_parallel", lambda: None)
    count_items = Kernel(module, "count_items", "visits workers")
    for num_items in (0, 1, 2, 500):
        visits, seen = torch.zeros(500), torch.zeros(8)
        count_items.launch(num_items, workers, visits.data_ptr(), seen.data_ptr())
        assert (visits[:num_items] == 1).all() and (visits[num_items:] == 0).all()
        assert (seen[workers:] == 0).all()


@pytest.mark.parametrize("openmp", [True, False])
@pytest.mark.parametrize("workers", [1, 2, 5])
def test_a_phase_begins_when_the_one_before_is_finished(module: str, workers, openmp, monkeypatch) -> None:
    if not openmp:
        monkeypatch.setattr(threads, "_gomp_parallel", lambda: None)
    kernel = Kernel(module, "two_phases", "finished x doubled sums count")
    doubled, sums = torch.empty(37), torch.empty(11)
    prepared = kernel.prepare(37 + 11, workers, 1, doubled.data_ptr(), sums.data_ptr(), 37)
    for call in range(100):
        x = torch.randint(0, 100, (37,)).float()
        doubled.fill_(math.nan)
        sums.fill_(math.nan)
        if call % 2:
            kernel(48, workers=workers, x=x, doubled=doubled, sums=sums, count=37)
        else:
            prepared(x.data_ptr())
        assert (sums == 2 * x.sum()).all()


def test_as_many_threads_as_pytorch_has(two_threads: None) -> None:
    assert [num_workers(items) for items in (0, 1, 2, 9)] == [1, 1, 2, 2]
    torch.set_num_threads(1)
    assert num_workers(9) == 1


def test_kernels_run_at_once_in_several_python_threads(module: str, two_threads: None) -> None:
    count_items = Kernel(module, "count_items", "visits workers")

    def job(_: int) -> bool:
        visits, seen = torch.zeros(3000), torch.zeros(2)
        for _ in range(20):
            count_items.launch(3000, 2, visits.data_ptr(), seen.data_ptr())
        return bool((visits == 20).all())

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(job, range(8)))


@pytest.mark.parametrize("workers", [1, 2])
def test_kernels_hold_no_gil(module: str, workers: int) -> None:
    flag, seen = torch.zeros(1, dtype=torch.int64), torch.zeros(2)
    wait_for = Kernel(module, "wait_for", "flag seen limit")
    wait_for.compile()
    arguments = {"workers": workers, "flag": flag, "seen": seen, "limit": 2 * 10**10}
    thread = threading.Thread(target=wait_for, args=(1,), kwargs=arguments)
    thread.start()
    flag.fill_(1)
    thread.join(timeout=240)
    assert seen[0] == 1


FORK = """
import multiprocessing, os, sys, torch
from statespan.ops.numba_kernels import Kernel

def works():
    torch.set_num_threads(2)
    visits, seen = torch.zeros(300), torch.zeros(2)
    Kernel("cpu_probe", "count_items", "visits workers").launch(300, 2, visits.data_ptr(), seen.data_ptr())
    return bool((visits == 1).all())

def child():
    sys.exit(0 if works() else 1)

if __name__ == "__main__":
    assert works()
    for method in {methods}:
        process = multiprocessing.get_context(method).Process(target=child)
        process.start()
        process.join(240)
        assert process.exitcode == 0, (method, process.exitcode)
"""


def test_forked_and_spawned_children_run_kernels_after_their_parent_did(module: str, tmp_path: Path) -> None:
    methods = [method for method in ("fork", "spawn") if method != "fork" or hasattr(os, "fork")]
    (tmp_path / "children.py").write_text(FORK.replace("{methods}", repr(methods)))
    run = subprocess.run(
        [sys.executable, str(tmp_path / "children.py")], capture_output=True, text=True, timeout=600, check=False
    )
    assert run.returncode == 0, run.stderr


# The cache.


def test_a_kernel_is_announced_and_compiled_once_until_its_source_changes(module, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "cache"))
    source = tmp_path / "cpu_cached.py"
    header = "from statespan.ops.numba_kernels.vector import *\n"
    text = header + "@jit\ndef one(item, worker, x):\n    store_scalar(x, 0, {})\n"
    code = (
        f"import sys, torch; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from statespan.ops.numba_kernels import Kernel\n"
        "x = torch.zeros(1); Kernel('cpu_cached', 'one', 'x')(1, x=x); print(x.item(), 'numba' in sys.modules)"
    )
    outcomes = []
    for value in (1.0, 1.0, 2.0):
        source.write_text(text.format(value))
        run = run_python(code)
        outcomes.append((run.stdout.strip(), run.stderr.strip()))
    line = f"statespan: compiling cpu_cached.one (once; cached in {tmp_path / 'cache' / 'statespan'})"
    assert outcomes == [("1.0 True", line), ("1.0 False", ""), ("2.0 True", line)]


def test_where_nothing_can_be_written_kernels_compile_each_time(module, tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "file" / "cache"))
    x = torch.arange(3.0)
    y = torch.empty(3)
    Kernel(module, "copy", "x y count x_bf16 y_bf16")(1, x=x, y=y, count=3, x_bf16=0, y_bf16=0)
    assert y.tolist() == [0.0, 1.0, 2.0]
    message = "statespan: compiling cpu_probe.copy (once; not cached: no folder to write to, set NUMBA_CACHE_DIR)\n"
    assert capsys.readouterr().err == message


def test_a_kernel_that_could_raise_is_refused(module: str) -> None:
    with pytest.raises(AssertionError, match="nothing may raise"):
        Kernel(module, "may_raise", "x step").compile()


def test_arguments_must_be_those_of_the_kernel(module: str) -> None:
    with pytest.raises(TypeError, match="copy takes"):
        Kernel(module, "copy", "x y count x_bf16 y_bf16")(1, x=torch.zeros(3), count=3)
    with pytest.raises(AssertionError, match="its Kernel says"):
        Kernel(module, "copy", "x y").compile()


def test_scratch_rows_are_for_each_worker_and_apart() -> None:
    memory = scratch(3, 33)
    assert memory.shape == (3, 64)
    assert memory.dtype == torch.float32
