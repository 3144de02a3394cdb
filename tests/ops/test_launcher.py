"""What a launch hands to the device: arguments in memory for CUDA kernels, a known kernel for Triton's."""

import ctypes

import pytest
import torch

from statespan.ops.cuda_kernels import launcher as cuda_launcher
from statespan.ops.triton_kernels import launcher


class Compiled:
    """A compiled kernel as Triton gives it; notes what it is launched with."""

    def __init__(self) -> None:
        self.launched = []

    def __getitem__(self, grid):
        return lambda *values: self.launched.append((grid, values))


class Kernel:
    """A kernel as Triton's decorator makes it, which compiles at each look-up."""

    arg_names = ("x", "y", "size", "scale", "BLOCK", "SILU")

    def __init__(self) -> None:
        self.compiled = []

    def __getitem__(self, grid):
        def look_up(*arguments, **options):
            self.compiled.append(Compiled())
            return self.compiled[-1]

        return look_up


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(launcher, "_known", {})
    return Kernel()


def launch(kernel, x, y, size=5, silu=True, warps=4) -> None:
    launcher.launch(kernel, (3,), x, y, size, 0.5, SILU=silu, BLOCK=16, num_warps=warps)


def test_a_known_launch_gets_the_addresses_of_this_call_and_all_constants(kernel: Kernel) -> None:
    for _ in range(3):
        x = torch.zeros(8)
        launch(kernel, x, None)
    (compiled,) = kernel.compiled
    grid, values = compiled.launched[-1]
    assert len(compiled.launched) == 2
    assert grid == (3, 1, 1) and values == (x.data_ptr(), None, 5, 0.5, 16, True)


def test_what_triton_specialises_on_is_looked_up_again(kernel: Kernel) -> None:
    x, y = torch.zeros(64), torch.zeros(64)
    variants = [
        (x, y),
        (x[1:], y),  # 4 bytes further: not aligned
        (x, y.bfloat16()),
        (x, None),
        (x, y, 6),
        (x, y, 1),
        (x, y, 1.0),
        (x, y, True),
        (x, y, 5, False),
        (x, y, 5, True, 8),
    ]
    for _ in range(2):
        for arguments in variants:
            launch(kernel, *arguments)
    assert len(kernel.compiled) == len(variants)
    assert all(len(compiled.launched) == 1 for compiled in kernel.compiled)


@pytest.mark.parametrize(("hip", "forms"), [(False, 1), (True, 2)])
def test_memory_of_2_gib_is_another_form_for_amd(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch, hip: bool, forms: int
) -> None:
    """Triton's machine code for less of it counts in 32 bits there."""
    monkeypatch.setattr(launcher, "HIP", hip)
    small, large = (torch.empty(size, dtype=torch.int8, device="meta") for size in ((1 << 31) - 1, 1 << 31))
    for x in (small, large, large[:5], small[:5]):
        launch(kernel, x, None)
    assert len(kernel.compiled) == forms


def test_another_kernel_is_not_this_one(kernel: Kernel) -> None:
    other, x = Kernel(), torch.zeros(4)
    for each in (kernel, other, kernel, other):
        launch(each, x, x)
    assert len(kernel.compiled) == len(other.compiled) == 1


def test_the_memory_of_launches_is_bounded(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "MOST", 10)
    x = torch.zeros(4)
    for size in range(100):
        launch(kernel, x, x, size)
        assert len(launcher._known) <= 10


def test_arguments_of_a_cuda_kernel_lie_where_the_driver_looks() -> None:
    arguments = cuda_launcher._Arguments(3)
    for values in ((1, -2, 1 << 46), (0, 7, (1 << 63) - 1)):
        places = (ctypes.c_void_p * 3).from_address(arguments.place(values))
        assert [ctypes.c_int64.from_address(place or 0).value for place in places] == list(values)


def test_a_cuda_launch_passes_sizes_and_says_what_the_driver_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = pytest.importorskip("cuda.bindings.driver")
    passed, status = [], [driver.CUresult.CUDA_SUCCESS]

    def cuLaunchKernel(function, *rest):
        *sizes, stream, at, extra = rest
        places = (ctypes.c_void_p * 2).from_address(at)
        passed.append((sizes, int(stream), [ctypes.c_int64.from_address(place or 0).value for place in places], extra))
        return (status[0],)

    monkeypatch.setattr(driver, "cuLaunchKernel", cuLaunchKernel)
    monkeypatch.setattr(cuda_launcher, "enter", lambda device: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 77, raising=False)
    kernel = type("Kernel", (), {"handle": 5})()
    run = cuda_launcher.Launch("scan", 0, kernel, (4, 2, 1, 128, 1, 1, 1000))
    run(3, 9)
    run(1 << 40, 0)
    assert passed == [([4, 2, 1, 128, 1, 1, 1000], 77, values, 0) for values in ([3, 9], [1 << 40, 0])]
    status[0] = driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY
    with pytest.raises(torch.OutOfMemoryError, match="scan: CUDA_ERROR_OUT_OF_MEMORY"):
        run(1, 2)
    status[0] = driver.CUresult.CUDA_ERROR_INVALID_VALUE
    with pytest.raises(RuntimeError, match="scan: CUDA_ERROR_INVALID_VALUE"):
        run(1, 2)
