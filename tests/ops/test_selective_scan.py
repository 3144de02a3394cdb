"""The selective scan against the recurrence in float64: outputs, states and every gradient."""

import ctypes
import math
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from statespan.errors import BackendUnavailable, UnknownName, UserError
from statespan.ops import selective_scan
from statespan.ops.selective_scan import backends, cuda_plan

GPU = ["cuda", "triton"] if torch.cuda.is_available() else []  # conftest.py makes their tests' tensors on the GPU
FAST = ["cpu", *GPU]
BACKENDS = [*FAST, "reference"]
DISCRETIZATIONS = ["mamba", "zoh", "bilinear"]
LIMIT = 3e-6  # float32 against float64, of the largest value
NAMES = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")


def make(batch=2, length=9, channels=12, groups=2, states=5, dtype=torch.float32, **without: bool) -> dict[str, Tensor]:
    """Random inputs. As in the mixer, u and z are the halves of one projection, dt, B and C slices of another."""
    u, z = torch.randn(batch, length, 2 * channels).to(dtype).chunk(2, dim=-1)
    sizes = [channels, groups * states, groups * states]
    dt, B, C = torch.randn(batch, length, sum(sizes)).to(dtype).split(sizes, dim=-1)
    inputs = {
        "u": u,
        "dt": dt - 1 if dtype == torch.float32 else dt,
        "A": -torch.rand(channels, states) * 4 - 0.01,
        "B": B.unflatten(-1, (groups, states)),
        "C": C.unflatten(-1, (groups, states)),
        "D": torch.randn(channels),
        "z": z,
        "dt_bias": torch.randn(channels) * 0.3,
        "initial_state": torch.randn(batch, channels, states),
    }
    return {name: value for name, value in inputs.items() if without.get(name, True)}


def run(inputs: dict[str, Tensor], dtype: torch.dtype | None = None, **options) -> dict[str, Tensor]:
    """y, the final state, and the gradients of a random projection of both, by name."""
    leaves = {name: value.detach().to(dtype or value.dtype).requires_grad_() for name, value in inputs.items()}
    return with_gradients(*selective_scan(**leaves, return_final_state=True, **options), leaves)


def with_gradients(y: Tensor, state: Tensor, leaves: dict[str, Tensor], places: Tensor | None = None):
    """y, the final state, and the gradients of a random projection of both: the same one for the same shapes.

    With places [t], y holds only these places of the sequence that the projection is for.
    """
    on = {"generator": torch.Generator(y.device).manual_seed(1), "device": y.device}
    length = y.shape[1] if places is None else len(places)
    weight = torch.randn(y.shape[0], length, y.shape[2], **on).to(y.dtype)
    loss = (y * (weight if places is None else weight[:, places])).sum()
    loss = loss + (state * torch.randn(state.shape, **on)).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return {"y": y, "final_state": state, **dict(zip(leaves, gradients, strict=True))}


def assert_close(found: dict[str, Tensor], exact: dict[str, Tensor], limit: float = LIMIT) -> None:
    assert found.keys() == exact.keys()
    for name, value in found.items():
        scale = exact[name].abs().max().clamp(min=1e-6)
        error = (value.double() - exact[name].double()).abs().max() / scale
        assert value.shape == exact[name].shape and error <= limit, f"{name}: {error:.1e} of the largest value"


def scalar_scan(inputs: dict[str, Tensor], discretization: str, softplus: bool) -> tuple[Tensor, Tensor]:
    """The paper's recurrence, a Python number at a time."""
    value = {name: tensor.double().tolist() for name, tensor in inputs.items()}
    batch, length, channels = inputs["u"].shape
    groups, states = inputs["B"].shape[2:]
    y, h = torch.zeros(batch, length, channels, dtype=torch.float64), inputs["initial_state"].double().clone()
    for b in range(batch):
        for t in range(length):
            for d in range(channels):
                g, u, gate = d // (channels // groups), value["u"][b][t][d], value["z"][b][t][d]
                dt = value["dt"][b][t][d] + value["dt_bias"][d]
                dt = math.log1p(math.exp(dt)) if softplus else dt
                for n in range(states):
                    x = dt * value["A"][d][n]
                    if discretization == "bilinear":
                        Abar, Bbar = (1 + x / 2) / (1 - x / 2), dt / (1 - x / 2)
                    else:
                        Abar, Bbar = math.exp(x), dt
                    if discretization == "zoh":
                        Bbar = math.expm1(x) / value["A"][d][n]
                    h[b, d, n] = Abar * h[b, d, n] + Bbar * value["B"][b][t][g][n] * u
                    y[b, t, d] += value["C"][b][t][g][n] * h[b, d, n]
                y[b, t, d] = (y[b, t, d] + value["D"][d] * u) * gate / (1 + math.exp(-gate))
    return y, h


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.parametrize("discretization", DISCRETIZATIONS)
def test_the_recurrence_of_the_paper(discretization: str, softplus: bool, backend: str) -> None:
    inputs = make(batch=2, length=7, channels=6, groups=3, states=4)
    if not softplus:
        inputs["dt"], inputs["dt_bias"] = inputs["dt"].abs(), inputs["dt_bias"].abs()
    options = {"discretization": discretization, "dt_softplus": softplus, "backend": backend}
    y, state = selective_scan(**inputs, return_final_state=True, **options)
    exact_y, exact_state = scalar_scan(inputs, discretization, softplus)
    assert_close({"y": y, "state": state}, {"y": exact_y, "state": exact_state})


@pytest.mark.parametrize("discretization", DISCRETIZATIONS)
def test_gradients_of_the_reference_are_those_of_finite_differences(discretization: str) -> None:
    inputs = {name: v.double().requires_grad_() for name, v in make(1, 4, 4, 2, 2).items()}
    segments = torch.tensor([[0, -1, 0, 1]])

    def scan(*tensors: Tensor):
        named = dict(zip(inputs, tensors, strict=True))
        return selective_scan(**named, segments=segments, return_final_state=True, discretization=discretization)

    assert torch.autograd.gradcheck(scan, tuple(inputs.values()))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("discretization", DISCRETIZATIONS)
@pytest.mark.parametrize(
    ("batch", "length", "channels", "groups", "states"),
    [
        (2, 1, 12, 1, 16),
        (1, 2, 5, 1, 1),
        (2, 63, 37, 1, 8),
        (1, 257, 20, 1, 16),
        (1, 33, 48, 3, 24),  # groups are one vector each
        (3, 31, 24, 8, 3),  # groups are less than a vector
        (1, 40, 300, 1, 2),  # several blocks of vectors
        (1, 34, 3, 1, 128),
    ],
)
def test_values_and_gradients_equal_those_in_float64(
    batch, length, channels, groups, states, discretization, backend, nan_in_new_tensors
) -> None:
    inputs = make(batch, length, channels, groups, states)
    exact = run(inputs, torch.float64, discretization=discretization)
    assert_close(run(inputs, discretization=discretization, backend=backend), exact)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("left_out", [*NAMES[5:], "all"])
def test_optional_inputs_may_be_left_out(left_out: str, backend: str, nan_in_new_tensors) -> None:
    inputs = make(**{name: left_out not in (name, "all") for name in NAMES[5:]}, length=35)
    inputs["dt"] = inputs["dt"].abs()
    assert_close(run(inputs, backend=backend), run(inputs, torch.float64))
    inputs["dt"] = inputs["dt"] + 1  # positive with the bias, too
    options = {"dt_softplus": False}
    assert_close(run(inputs, backend=backend, **options), run(inputs, torch.float64, **options))


@pytest.mark.parametrize("backend", FAST)
def test_a_gradient_of_the_output_or_of_the_state_alone(backend: str) -> None:
    inputs = {name: value.requires_grad_() for name, value in make().items()}
    exact = {name: value.detach().double().requires_grad_() for name, value in inputs.items()}
    for part in (0, 1):
        found = selective_scan(**inputs, return_final_state=True, backend=backend)[part].square().sum()
        truth = selective_scan(**exact, return_final_state=True)[part].square().sum()
        found, truth = (torch.autograd.grad(v, [*i.values()], allow_unused=True, materialize_grads=True)
                        for v, i in ((found, inputs), (truth, exact)))  # fmt: skip
        assert_close(dict(zip(NAMES, found, strict=True)), dict(zip(NAMES, truth, strict=True)))


@pytest.mark.parametrize("backend", FAST)
def test_extreme_step_sizes_and_decays(backend: str) -> None:
    inputs = make(length=6, channels=16, groups=1)
    inputs["dt"] = torch.linspace(-30, 60, 6).reshape(1, 6, 1).expand(2, 6, 16).contiguous()
    inputs["A"] = -torch.logspace(-6, 4, 16).reshape(16, 1).expand(16, 5).contiguous()
    for discretization in ("mamba", "zoh", "bilinear"):
        options = {"discretization": discretization}
        assert_close(run(inputs, backend=backend, **options), run(inputs, torch.float64, **options))


# Segments and states.


def joined(parts: list[dict[str, Tensor]], name: str) -> Tensor:
    return torch.cat([part[name] for part in parts], dim=1)


SEQUENCES = ("u", "dt", "B", "C", "z")


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_sequences_equal_separate_ones(backend: str) -> None:
    whole = make(batch=1, length=75)
    bounds = [0, 1, 20, 21, 64, 75]
    segments = torch.cat([torch.full((b - a,), 3 * i % 4) for i, (a, b) in enumerate(pairwise(bounds))])[None]
    found = run(whole, segments=segments, backend=backend)

    leaves = {name: value.detach().double().requires_grad_() for name, value in whole.items()}
    outputs, state = [], None
    for i, (a, b) in enumerate(pairwise(bounds)):
        part = {name: value[:, a:b] if name in SEQUENCES else value for name, value in leaves.items()}
        if i > 0:
            part["initial_state"] = torch.zeros_like(part["initial_state"])
        y, state = selective_scan(**part, return_final_state=True, backend="reference")
        outputs.append(y)
    assert_close(found, with_gradients(torch.cat(outputs, dim=1), state, leaves))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("where", ["left", "right", "middle", "everywhere"])
def test_padding_is_as_if_it_were_not_there(where: str, backend: str, nan_in_new_tensors) -> None:
    length = 70
    inputs = make(batch=1, length=length)
    real = torch.ones(length, dtype=torch.bool)
    middle, everywhere = [*range(20, 55)], [0, 31, 32, 33, 69]
    real[{"left": [*range(33)], "right": [*range(60, 70)], "middle": middle, "everywhere": everywhere}[where]] = False
    numbers = torch.arange(length) // 29
    segments = torch.where(real, numbers, -2)[None]
    for name in SEQUENCES:  # what stands in a padded place must not matter
        inputs[name] = inputs[name].clone()
        inputs[name][:, ~real] = math.nan

    def without_padding() -> dict[str, Tensor]:
        leaves = {name: value[:, real] if name in SEQUENCES else value for name, value in inputs.items()}
        leaves = {name: value.double().requires_grad_() for name, value in leaves.items()}
        y, state = selective_scan(**leaves, segments=numbers[real][None], return_final_state=True)
        return with_gradients(y, state, leaves, places=real)

    exact = without_padding()
    with torch.no_grad():
        y, state = selective_scan(**inputs, segments=segments, return_final_state=True, backend=backend)
    assert (y[:, ~real] == 0).all()
    assert_close({"y": y[:, real], "state": state}, {"y": exact["y"], "state": exact["final_state"]})

    for name in SEQUENCES:
        inputs[name] = inputs[name].nan_to_num(0.5)
    found = run(inputs, segments=segments, backend=backend)
    for name in SEQUENCES:
        assert (found[name][:, ~real] == 0).all(), name
    assert_close({name: v[:, real] if name in (*SEQUENCES, "y") else v for name, v in found.items()}, exact)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_of_padding_alone_passes_its_state_on(backend: str) -> None:
    inputs = make(batch=2, length=40)
    segments = torch.zeros(2, 40, dtype=torch.int64)
    segments[1] = -1
    found = run(inputs, segments=segments, backend=backend)
    assert (found["y"][1] == 0).all()
    assert torch.equal(found["final_state"][1], inputs["initial_state"][1])
    assert all((found[name][1] == 0).all() for name in SEQUENCES)
    assert_close(found, run(inputs, torch.float64, segments=segments))


@pytest.mark.parametrize("discretization", DISCRETIZATIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_documents_do_not_see_each_others_infinities(backend: str, discretization: str) -> None:
    inputs = make(batch=1, length=40, states=5)
    segments = (torch.arange(40) >= 20).long()[None]
    options = {"segments": segments, "discretization": discretization, "backend": backend}
    with torch.no_grad():
        clean = selective_scan(**inputs, **options)
        inputs["u"] = inputs["u"].clone()
        inputs["u"][:, 5] = math.inf
        dirty = selective_scan(**inputs, **options)
    assert not dirty[:, 10:20].isfinite().all()
    assert torch.equal(dirty[:, 20:], clean[:, 20:])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cut", [1, 32, 45])
def test_chunks_that_hand_on_the_state_equal_the_whole(cut: int, backend: str) -> None:
    inputs = make(length=77)
    segments = (torch.arange(77) >= 60).long().repeat(2, 1)
    segments[0, [3, 33, 44, 45, 46, 70]] = -1
    leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
    outputs, state = [], leaves["initial_state"]
    for piece in (slice(0, cut), slice(cut, 77)):
        part = {name: value[:, piece] if name in SEQUENCES else value for name, value in leaves.items()}
        part["initial_state"] = state
        y, state = selective_scan(**part, segments=segments[:, piece], return_final_state=True, backend=backend)
        outputs.append(y)
    found = with_gradients(torch.cat(outputs, dim=1), state, leaves)
    assert_close(found, run(inputs, torch.float64, segments=segments))


# Dtypes, bits, threads.

# Of the error that PyTorch makes in the same dtype with the reference, which rounds at the same places.
BF16_FACTOR = 1.5


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("which", [SEQUENCES, ("u", "z"), ("dt", "B", "C")])
def test_bfloat16_is_about_as_exact_as_pytorch(which: tuple[str, ...], backend: str) -> None:
    inputs = make(batch=1, length=130, channels=32, groups=1, states=16)
    inputs = {name: value.bfloat16() if name in which else value for name, value in inputs.items()}
    exact = run(inputs, torch.float64)
    found, yardstick = run(inputs, backend=backend), run(inputs, backend="reference")
    for name, value in found.items():
        assert value.dtype == yardstick[name].dtype
        errors = [(result.double() - exact[name]).square().mean().sqrt() for result in (value, yardstick[name])]
        assert errors[0] <= BF16_FACTOR * errors[1] + 1e-6 * exact[name].abs().max(), name


def test_the_final_state_is_float32_and_the_output_has_the_inputs_dtype() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        inputs = {name: value.to(dtype) if name in SEQUENCES else value for name, value in make().items()}
        y, state = selective_scan(**inputs, return_final_state=True)
        assert y.dtype == dtype and y.isfinite().all()
        assert state.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("backend", FAST)
def test_transposed_inputs_and_gradients(backend: str) -> None:
    inputs = make(length=20)
    strange = {name: value.transpose(0, -1).contiguous().transpose(0, -1) for name, value in inputs.items()}
    assert not strange["u"].is_contiguous()
    plain, found = run(inputs, backend=backend), run(strange, backend=backend)
    assert all(torch.equal(plain[name], found[name]) for name in plain)
    leaf = inputs["u"].detach().requires_grad_()
    y = selective_scan(**{**inputs, "u": leaf}, backend=backend)
    expanded = torch.autograd.grad(y.sum(), leaf, retain_graph=True)[0]  # the gradient of a sum has no strides
    assert torch.equal(expanded, torch.autograd.grad(y, leaf, torch.ones_like(y))[0])


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.parametrize("backend", FAST)
def test_the_same_bits_in_every_run_and_every_python_thread(backend: str, two_threads: None) -> None:
    inputs = make(batch=2, length=70, channels=200, groups=2)
    first = run(inputs, backend=backend)

    def again(_: int) -> bool:
        torch.set_num_threads(2)
        return all(torch.equal(value, first[name]) for name, value in run(inputs, backend=backend).items())

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(again, range(12)))


FORK = """
import os, torch
from statespan.ops import selective_scan
torch.set_num_threads(2)
u, dt = torch.randn(2, 1, 50, 100).requires_grad_().unbind()
A, B = -torch.rand(100, 4), torch.randn(1, 50, 1, 4)

def gradient():
    return torch.autograd.grad(selective_scan(u, dt, A, B, B).square().sum(), u)[0]

expected = gradient()
child = os.fork()
if child == 0:
    os._exit(0 if (gradient() == expected).all().item() else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert torch.equal(gradient(), expected)
"""
MEMORY = """
import resource, torch
from statespan.ops import selective_scan
u = torch.randn(1, 4096, 256, requires_grad=True)
B = torch.randn(1, 4096, 1, 64)
A = -torch.rand(256, 64)
selective_scan(u[:, :2], u[:, :2], A, B[:, :2], B[:, :2]).sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
selective_scan(u, u, A, B, B).sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def python(code: str) -> str:
    """What code prints in a fresh interpreter; a hang is a failure."""
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_forked_child_runs_it_after_its_parent_did() -> None:
    python(FORK)


def test_nothing_of_the_size_of_all_states_is_made() -> None:
    all_states = 4096 * 256 * 64 * 4 / 2**20  # 256 MiB
    assert float(python(MEMORY)) < all_states / 3


@pytest.mark.parametrize("backend", GPU)
@pytest.mark.parametrize(
    ("states", "discretization", "segmented"), [(16, "mamba", False), (8, "zoh", True), (5, "bilinear", True)]
)
def test_splits_of_a_long_sequence(states: int, discretization: str, segmented: bool, backend: str) -> None:
    """Few channels and many tokens: the tokens are divided into splits that run side by side."""
    inputs = make(1, 1090, 16, 2, states)
    inputs["dt"] = inputs["dt"] - 4  # so that the states of one split still matter in the next
    options: dict = {"discretization": discretization}
    if segmented:
        segments = (torch.arange(1090) // 500)[None]
        options["segments"] = torch.where(torch.rand(1, 1090) < 0.1, -1, segments)
    found, exact = run(inputs, backend=backend, **options), run(inputs, torch.float64, **options)
    yardstick = run(inputs, backend="reference", **options)
    for name, value in found.items():
        errors = [(result.double() - exact[name]).abs().max() for result in (value, yardstick[name])]
        assert errors[0] <= 3 * errors[1] + LIMIT * exact[name].abs().max(), name


def check_halves(inputs: dict[str, Tensor], **options) -> None:
    """On the backend "cuda", in 16 bits, no further from float64 than plain PyTorch is in the same."""
    exact, yardstick = run(inputs, torch.float64, **options), run(inputs, backend="reference", **options)
    for name, value in run(inputs, backend="cuda", **options).items():
        errors = [(result.double() - exact[name]).abs().max() for result in (value, yardstick[name])]
        assert errors[0] <= 2 * errors[1] + 2**-10 * exact[name].abs().max(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rates_come_as_float32_without_gaps(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the kernel that multiplies A's gradient, too, which would read beyond the end of anything else."""
    from statespan.ops.selective_scan import cuda_backend
    from statespan.ops.selective_scan.inputs import Inputs, Options

    inputs, given = make(groups=1), list[Tensor]()

    def sums(*arguments: int) -> None:
        numbers = (ctypes.c_float * inputs["A"].numel()).from_address(arguments[-1])
        given.append(torch.tensor(list(numbers)).view(inputs["A"].shape))

    sizes = {"splits": 1, "split": 64, "blocks": 1, "tiles_a_block": 1}
    work = SimpleNamespace(main=lambda *_: None, sums=sums, chained=False, **sizes)
    scan = SimpleNamespace(batch=2, channels=12, groups=1, sizes=(), backward=lambda: work)
    monkeypatch.setattr(cuda_backend, "scan_of", lambda layout: scan)
    A = inputs["A"].to(dtype)
    tensors = Inputs(**inputs | {"A": A.T.contiguous().T})
    arguments = (torch.randn(2, 9, 12), None, torch.zeros(1), tensors, Options(True, "mamba"))
    cuda_backend.gradients(*arguments, of_log=True)
    assert torch.equal(given[0], A.float())


@pytest.fixture
def planned_anew() -> Iterator[None]:
    cuda_plan.scan_of.cache_clear()
    yield
    cuda_plan.scan_of.cache_clear()


@pytest.mark.parametrize("document", [None, 50, 333])
@pytest.mark.parametrize(
    ("states", "form"),
    [
        (states, form)
        for states, (split, _) in cuda_plan.FORMS_OF_SPLITS.items()
        for form in (*cuda_plan.FORMS[states], split)
    ],
    ids=lambda value: f"{value[:3]}" if isinstance(value, tuple) else str(value),
)
@pytest.mark.parametrize("backend", GPU[:1])
def test_every_form_of_the_forward(
    states: int,
    form: cuda_plan.Form,
    document: int | None,
    backend: str,
    planned_anew: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cuda_plan.Scan, "forward_plan", lambda work: (form, -(-work.length // 64) * 64))
    inputs = make(2, 333, 136, 1, states, torch.bfloat16)
    segments = torch.where(torch.rand(2, 333) < 0.1, -1, torch.arange(333) // document) if document else None
    check_halves(inputs, segments=segments)


@pytest.mark.parametrize("states", [8, 16, 32, 64, 128])
@pytest.mark.parametrize("backend", GPU[:1])
def test_state_sizes_in_16_bits(states: int, backend: str) -> None:
    check_halves(make(2, 131, 72, 1, states, torch.bfloat16))


@pytest.mark.parametrize("states", [16, 64])
@pytest.mark.parametrize("backend", GPU[:1])
def test_splits_that_wait_for_each_other(
    states: int, backend: str, planned_anew: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where there are more tiles than blocks at once: the backward's splits pass on what the state gets."""
    monkeypatch.setattr(cuda_plan, "multiprocessors", lambda device: 1)
    monkeypatch.setattr(cuda_plan, "_chained_split", lambda blocks, chunks, room: (64, 0.0))
    made = []
    build = cuda_plan.Scan.backward
    monkeypatch.setattr(cuda_plan.Scan, "backward", lambda work: made.append(build(work)) or made[-1])
    inputs = make(2, 333, 136, 1, states, torch.bfloat16)
    inputs["dt"] = inputs["dt"] - 4  # so that the states of one split still matter in the next
    check_halves(inputs)
    assert made[-1].chained and made[-1].splits == 6


@pytest.mark.parametrize("form", [cuda_plan.ROLES, cuda_plan.WITH_DECAYS], ids=["roles", "decays"])
@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("backend", GPU[:1])
def test_every_form_of_the_backward(
    form: cuda_plan.BackwardForm,
    segmented: bool,
    splits: int,
    backend: str,
    planned_anew: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As where a multiprocessor gets two blocks."""
    if form.roles and not cuda_plan.hands_over_registers(torch.device("cuda", torch.cuda.current_device())):
        pytest.skip("such registers are handed over on Hopper only")
    monkeypatch.setattr(cuda_plan.Scan, "backward_plan", lambda work, number: (form, 384 // splits, False))
    segments = torch.where(torch.rand(2, 333) < 0.1, -1, torch.arange(333) // 50) if segmented else None
    check_halves(make(2, 333, 136, 1, 16, torch.bfloat16), segments=segments)


@pytest.mark.parametrize("backend", GPU)
def test_offsets_beyond_32_bits(backend: str) -> None:
    """A million tokens of 2,112 channels: the last ones equal those of a scan that begins near them."""
    length, channels, tail = 2**20, 2112, 512
    of_channels = torch.randn(1, length, channels, dtype=torch.bfloat16).requires_grad_()
    matrices = torch.randn(1, length, 1, 16, dtype=torch.bfloat16).requires_grad_()
    A, bias = -torch.ones(channels, 16), torch.full((channels,), 3.0)  # forgets within a few tokens

    def scan(x: Tensor, matrix: Tensor) -> list[Tensor]:
        y = selective_scan(x, x, A, matrix, matrix, z=x, dt_bias=bias, backend=backend)
        return [y[:, -tail:].clone(), *torch.autograd.grad(y[:, -tail:].sum(), (x, matrix))]

    whole = scan(of_channels, matrices)
    part = scan(
        of_channels[:, -2 * tail :].detach().requires_grad_(), matrices[:, -2 * tail :].detach().requires_grad_()
    )
    for a, b in zip(whole, part, strict=True):
        torch.testing.assert_close(a[:, -tail:], b[:, -tail:], rtol=2**-7, atol=1e-2)


@pytest.mark.parametrize("backend", GPU)
def test_tensors_on_two_devices_are_told(backend: str) -> None:
    inputs = make()
    with pytest.raises(UserError, match="selective_scan: u is on cuda:0, and B on cpu; move them to one device"):
        selective_scan(**{**inputs, "B": inputs["B"].cpu()}, backend=backend)


if not GPU:  # nothing to run them on: neither run nor skipped
    del test_splits_of_a_long_sequence, test_offsets_beyond_32_bits, test_tensors_on_two_devices_are_told


# Registration and mistakes.


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_registered_ops_are_sound(backend: str) -> None:
    inputs = make(length=5)
    leaves = [inputs[name].detach().requires_grad_() for name in NAMES]
    segments = torch.tensor([[0, 0, -1, 1, 1]] * 2)
    ops = torch.ops.statespan
    torch.library.opcheck(ops.selective_scan.default, (*leaves, segments, True, "mamba", True, backend))
    plain = [leaf.detach() for leaf in leaves]
    y, state, starts = ops.selective_scan(*plain, segments, True, "zoh", True, backend)
    arguments = (torch.randn_like(y), torch.randn_like(state), starts, *plain, segments, True, "zoh", backend)
    torch.library.opcheck(ops.selective_scan_backward.default, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_compiles_into_one_graph_forward_and_backward(backend: str) -> None:
    inputs, segments = make(length=6), torch.tensor([[0, 0, -1, 1, 1, 2]] * 2)
    eager = run(inputs, segments=segments, backend=backend)
    leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(leaves: dict[str, Tensor]):
        y, state = selective_scan(**leaves, segments=segments, return_final_state=True, backend=backend)
        return y * 1, state * 1

    found = with_gradients(*compiled(leaves), leaves)
    assert all(torch.equal(value, eager[name]) for name, value in found.items())


WRONG = {
    "u": ((2, 9), "u must be [b t d], got [2, 9]"),
    "dt": ((2, 9, 11), "dt must be [b t d] = [2, 9, 12], got [2, 9, 11]"),
    "A": ((12, 4), "B must be [b t g n] = [2, 9, 2, 4], got [2, 9, 2, 5]"),
    "B": ((2, 9, 5, 5), "the 5 groups of B and C must divide d = 12"),
    "C": ((2, 9, 2, 4), "C must be [b t g n] = [2, 9, 2, 5], got [2, 9, 2, 4]"),
    "D": ((1,), "D must be [d] = [12], got [1]"),
    "z": ((2, 1, 12), "z must be [b t d] = [2, 9, 12], got [2, 1, 12]"),
    "dt_bias": ((12, 1), "dt_bias must be [d] = [12], got [12, 1]"),
    "initial_state": ((2, 5, 12), "initial_state must be [b d n] = [2, 12, 5], got [2, 5, 12]"),
    "segments": ((2, 8), "segments must be [b t] = [2, 9], got [2, 8]"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_shape_is_told_in_one_line(name: str) -> None:
    shape, message = WRONG[name]
    with pytest.raises(UserError) as raised:
        selective_scan(**{**make(), name: torch.ones(shape, dtype=torch.int64 if name == "segments" else None)})
    assert str(raised.value) == f"selective_scan: {message}"


def test_no_time_step_is_an_error() -> None:
    with pytest.raises(UserError, match=r"u has no time step, its shape \[b t d\] is \[2, 0, 12\]"):
        selective_scan(**make(length=0))


@pytest.mark.parametrize(
    ("rows", "states", "refused"),
    [(65535, 128, []), (65536, 1, ["cuda"]), (1, 129, ["cuda"]), (1, 0, ["cuda", "triton"])],
)
def test_what_the_kernels_take(rows: int, states: int, refused: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not fit their grids or registers goes to the next backend; nothing of its output would be written."""
    limits = []
    monkeypatch.setattr(backends, "resolve", lambda *_, too_large: limits.append(too_large) or "reference")
    selective_scan(**make(rows, 1, 1, 1, states))
    assert [name for name, _ in limits[0]] == refused


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_scan_without_states_is_the_skip_and_the_gate(backend: str) -> None:
    inputs = make(states=0)
    y = selective_scan(**inputs, backend="auto" if backend in GPU else backend)
    torch.testing.assert_close(y, inputs["D"] * inputs["u"] * torch.nn.functional.silu(inputs["z"]))


def test_names_that_do_not_exist_or_cannot_run_here() -> None:
    with pytest.raises(UnknownName, match="unknown discretization: 'mambo'; did you mean 'mamba'"):
        selective_scan(**make(), discretization="mambo")
    with pytest.raises(UnknownName, match="unknown backend of selective_scan: 'cpus'; did you mean 'cpu'"):
        selective_scan(**make(), backend="cpus")
    with pytest.raises(BackendUnavailable, match="float32 and bfloat16, and a tensor is float64"):
        selective_scan(**{name: value.double() for name, value in make().items()}, backend="cpu")
    with pytest.raises(BackendUnavailable, match="the tensors are on meta"):
        selective_scan(**{name: value.to("meta") for name, value in make().items()}, backend="cpu")
