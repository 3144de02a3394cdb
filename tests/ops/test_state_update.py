"""One-token updates against the recurrences written out in float64, channel by channel."""

import math
import sys

import pytest
import torch

from statespan.errors import BackendUnavailable, UnknownName, UserError
from statespan.ops import selective_state_update, ssd_state_update

GPU = ["triton"] if torch.cuda.is_available() else []  # conftest.py makes their tests' tensors on the GPU
FAST = ["cpu", *GPU]
BACKENDS = [*FAST, "reference"]
DISCRETIZATIONS = ["mamba", "zoh", "bilinear"]
LIMIT = {torch.float32: 3e-6, torch.bfloat16: 2**-8}  # of the largest value


def scalar_step(dt, A, discretization):
    """Abar and the factor of B for two Python floats."""
    if discretization == "mamba":
        return math.exp(dt * A), dt
    if discretization == "zoh":
        return math.exp(dt * A), math.expm1(dt * A) / A
    return (1 + dt * A / 2) / (1 - dt * A / 2), dt / (1 - dt * A / 2)


def scalar_dt(dt, bias, softplus, limit=(0.0, math.inf)):
    dt = dt + bias
    dt = max(dt, 0.0) + math.log1p(math.exp(-abs(dt))) if softplus else dt
    return min(max(dt, limit[0]), limit[1])


def selective_truth(state, u, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=True, discretization="mamba"):
    state, u, dt, A, B, C = (v.double() for v in (state, u, dt, A, B, C))
    batch, channels, states = state.shape
    y, after = torch.zeros_like(u), torch.zeros_like(state)
    for b in range(batch):
        for d in range(channels):
            g = d // (channels // B.shape[1])
            step = scalar_dt(dt[b, d].item(), 0.0 if dt_bias is None else dt_bias[d].item(), dt_softplus)
            for n in range(states):
                decay, factor = scalar_step(step, A[d, n].item(), discretization)
                after[b, d, n] = decay * state[b, d, n] + factor * B[b, g, n] * u[b, d]
                y[b, d] += C[b, g, n] * after[b, d, n]
            y[b, d] += 0.0 if D is None else D[d].item() * u[b, d]
            if z is not None:
                gate = z[b, d].item()
                y[b, d] *= gate / (1 + math.exp(-gate))
    return y, after


def ssd_truth(
    state, x, dt, A, B, C, D=None, dt_bias=None, dt_softplus=True, dt_limit=(0.0, math.inf), discretization="mamba"
):
    state, x, dt, A, B, C = (v.double() for v in (state, x, dt, A, B, C))
    batch, heads, head_dim, _ = state.shape
    y, after = torch.zeros_like(x), torch.zeros_like(state)
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // B.shape[1])
            step = scalar_dt(dt[b, h].item(), 0.0 if dt_bias is None else dt_bias[h].item(), dt_softplus, dt_limit)
            decay, factor = scalar_step(step, A[h].item(), discretization)
            for p in range(head_dim):
                skip = 0.0 if D is None else (D[h] if D.dim() == 1 else D[h, p]).item()
                after[b, h, p] = decay * state[b, h, p] + factor * x[b, h, p] * B[b, g]
                y[b, h, p] = (after[b, h, p] * C[b, g]).sum() + skip * x[b, h, p]
    return y, after


def error(value, exact):
    return ((value.double() - exact).abs().max() / exact.abs().max()).item()


def selective_inputs(batch=2, channels=6, states=5, groups=2, dtype=torch.float32):
    """u, dt and z are strided slices of one projection, as in the mixer."""
    projected = torch.randn(batch, 3 * channels + 1).to(dtype)
    u, dt, z = projected[:, 1:].split(channels, dim=1)
    B, C = torch.randn(batch, 2, groups, states).to(dtype).unbind(1)
    A = -torch.rand(channels, states) * 4 - 0.01
    return (torch.randn(batch, channels, states), u, dt, A, B, C), {
        "D": torch.randn(channels),
        "z": z,
        "dt_bias": torch.randn(channels),
    }


def ssd_inputs(batch=2, heads=4, head_dim=3, states=5, groups=2, dtype=torch.float32):
    projected = torch.randn(batch, heads * head_dim + heads).to(dtype)
    x, dt = projected[:, : heads * head_dim].view(batch, heads, head_dim), projected[:, heads * head_dim :]
    B, C = torch.randn(batch, 2, groups, states).to(dtype).unbind(1)
    A = -torch.rand(heads) * 4 - 0.01
    return (torch.randn(batch, heads, head_dim, states), x, dt, A, B, C), {
        "D": torch.randn(heads),
        "dt_bias": torch.randn(heads),
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("discretization", DISCRETIZATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "channels", "states", "groups"), [(1, 1, 1, 1), (2, 5, 3, 1), (2, 33, 17, 3), (3, 6, 16, 2)]
)
def test_selective_values(batch, channels, states, groups, dtype, discretization, backend):
    inputs, options = selective_inputs(batch, channels, states, groups, dtype)
    before = inputs[0].clone()
    for some in (options, {"dt_softplus": False}, {"z": options["z"]}, {"D": options["D"]}):
        arguments = inputs if "dt_softplus" not in some else (*inputs[:2], inputs[2].abs(), *inputs[3:])
        exact = selective_truth(*arguments, **some, discretization=discretization)
        y, state = selective_state_update(*arguments, **some, discretization=discretization, backend=backend)
        assert y.dtype == dtype and state.dtype == torch.float32
        assert error(y, exact[0]) < LIMIT[dtype] and error(state, exact[1]) < LIMIT[torch.float32]
    assert torch.equal(inputs[0], before), "the state that went in is left as it is"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("discretization", DISCRETIZATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "heads", "head_dim", "states", "groups"),
    [(1, 1, 1, 1, 1), (2, 4, 5, 3, 2), (2, 3, 33, 17, 3), (1, 2, 4, 128, 1)],
)
def test_ssd_values(batch, heads, head_dim, states, groups, dtype, discretization, backend):
    inputs, options = ssd_inputs(batch, heads, head_dim, states, groups, dtype)
    before = inputs[0].clone()
    by_head_and_dim = {**options, "D": torch.randn(heads, head_dim), "dt_limit": (0.3, 0.8)}
    for some in (options, by_head_and_dim, {"dt_softplus": False}):
        arguments = inputs if "dt_softplus" not in some else (*inputs[:2], inputs[2].abs(), *inputs[3:])
        exact = ssd_truth(*arguments, **some, discretization=discretization)
        y, state = ssd_state_update(*arguments, **some, discretization=discretization, backend=backend)
        assert y.dtype == dtype and state.dtype == torch.float32
        assert error(y, exact[0]) < LIMIT[dtype] and error(state, exact[1]) < LIMIT[torch.float32]
    assert torch.equal(inputs[0], before), "the state that went in is left as it is"


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_steps_do_not_drift(backend):
    """200 steps in float32 stay as near to float64 as the state's rounding allows."""
    (state, u, dt, A, B, C), options = selective_inputs()
    exact, carried = state.double(), state
    wide = {name: value.double() for name, value in options.items()}
    for _ in range(200):
        u = torch.randn_like(u)
        y, carried = selective_state_update(carried, u, dt, A, B, C, **options, backend=backend)
        y_exact, exact = selective_state_update(
            exact, u.double(), dt.double(), A.double(), B.double(), C.double(), **wide, backend="reference"
        )
    assert error(carried, exact) < 3e-6 and error(y, y_exact) < 3e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_steps_stay_finite(backend):
    """dt from 1e-9 to 1e4 and decays from almost none to complete."""
    dt = torch.tensor([[1e-9, 1e-4, 1.0, 30.0, 1e3, 1e4]])
    A = -torch.tensor([1e-6, 1e-2, 1.0, 10.0, 1e4]).expand(6, 5)
    state, B = torch.randn(1, 6, 5), torch.randn(1, 1, 5)
    for discretization in DISCRETIZATIONS:
        arguments = (state, torch.randn(1, 6), dt, A, B, B)
        options = {"dt_softplus": False, "discretization": discretization}
        y, after = selective_state_update(*arguments, **options, backend=backend)
        exact = selective_truth(*arguments, **options)
        for d in range(6):
            assert error(after[:, d], exact[1][:, d]) < 1e-5 and error(y[:, d], exact[0][:, d]) < 1e-5
    large = torch.tensor([[-100.0, 100.0, 0.0, 20.0, -20.0, 88.0]])  # z and dt where e^x overflows or vanishes
    y, after = selective_state_update(state, large, large, A, B, B, z=large, backend=backend)
    exact = selective_truth(state, large, large, A, B, B, z=large)
    assert error(y, exact[0]) < 1e-5 and error(after, exact[1]) < 1e-5


@pytest.mark.parametrize("update", [selective_state_update, ssd_state_update])
def test_gradients_come_from_the_reference(update):
    inputs, options = selective_inputs() if update is selective_state_update else ssd_inputs()
    leaves = [v.double().requires_grad_() for v in inputs]
    more = {name: v.double().requires_grad_() for name, v in options.items()}

    def run(*values):
        return update(*values[:6], **dict(zip(more, values[6:], strict=True)))

    assert torch.autograd.gradcheck(run, (*leaves, *more.values()))
    y, _ = update(*(v.float() for v in leaves), **{name: v.float() for name, v in more.items()})
    exact = update(*leaves, **more)[0]
    ours, wanted = torch.autograd.grad(y.sum(), leaves), torch.autograd.grad(exact.sum(), leaves)
    assert all(torch.allclose(a, b, atol=1e-5, rtol=1e-4) for a, b in zip(ours, wanted, strict=True))
    with pytest.raises(UserError, match="no gradients"):
        update(*(v.float() for v in leaves), backend="cpu")
    with torch.no_grad():
        assert not update(*(v.float() for v in leaves), backend="cpu")[0].requires_grad


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(
    ("update", "make"), [(selective_state_update, selective_inputs), (ssd_state_update, ssd_inputs)]
)
def test_any_strides_and_dtypes(update, make, backend):
    inputs, options = make()
    wanted = update(*inputs, **options, backend=backend)
    strided = [v.transpose(-1, -2).contiguous().transpose(-1, -2) if v.dim() > 1 else v for v in inputs]
    for a, b in zip(update(*strided, **options, backend=backend), wanted, strict=True):
        assert torch.equal(a, b)
    mixed = [v.to(torch.bfloat16) if i in (2, 4) else v for i, v in enumerate(inputs)]  # dt and B in bfloat16
    exact = update(*(v.double() for v in mixed), **{name: v.double() for name, v in options.items()})
    for a, b in zip(update(*mixed, **options, backend=backend), exact, strict=True):
        assert error(a, b) < LIMIT[torch.float32]
    with pytest.raises(BackendUnavailable, match="float64"):
        update(*(v.double() for v in inputs), backend=backend)


@pytest.mark.parametrize(
    ("update", "make"), [(selective_state_update, selective_inputs), (ssd_state_update, ssd_inputs)]
)
def test_many_threads_give_the_same_bits(update, make):
    inputs, options = make(
        batch=2, states=16, **({"channels": 1100} if make is selective_inputs else {"head_dim": 300})
    )
    one = update(*inputs, **options, backend="cpu")
    torch.set_num_threads(3)
    many = update(*inputs, **options, backend="cpu")
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(backend):
    for update, make in ((selective_state_update, selective_inputs), (ssd_state_update, ssd_inputs)):
        inputs, options = make()
        with torch.autocast(inputs[0].device.type, dtype=torch.bfloat16):
            inside = update(*inputs, **options, backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(inside, update(*inputs, **options, backend=backend), strict=True))


@pytest.mark.parametrize("backend", FAST)
def test_outputs_may_hold_anything_before(backend, nan_in_new_tensors):
    for update, make in ((selective_state_update, selective_inputs), (ssd_state_update, ssd_inputs)):
        inputs, options = make()
        assert all(v.isfinite().all() for v in update(*inputs, **options, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_states_the_output_is_the_skip(backend, nan_in_new_tensors):
    backend = "auto" if backend in GPU else backend
    inputs, options = selective_inputs(states=0)
    y, state = selective_state_update(*inputs, **options, backend=backend)
    torch.testing.assert_close(y, options["D"] * inputs[1] * torch.nn.functional.silu(options["z"]))
    assert state.shape == inputs[0].shape
    inputs, options = ssd_inputs(states=0)
    y, state = ssd_state_update(*inputs, **options, backend=backend)
    torch.testing.assert_close(y, options["D"][:, None] * inputs[1])
    assert state.shape == inputs[0].shape


@pytest.mark.parametrize("update", [selective_state_update, ssd_state_update])
def test_without_states_no_kernel_is_asked(update, monkeypatch):
    """Nothing of the output would be written."""
    limits = []
    module = sys.modules["statespan.ops.state_update"]
    monkeypatch.setattr(module, "resolve", lambda *_, too_large: limits.append(too_large) or "reference")
    for states in (0, 1):
        inputs, _ = (selective_inputs if update is selective_state_update else ssd_inputs)(states=states)
        update(*inputs)
    assert [[name for name, _ in limit] for limit in limits] == [["triton"], []]


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    (state, u, dt, A, B, C), more = selective_inputs()
    arguments = (state, u, dt, A, B, C, more["D"], more["z"], more["dt_bias"], True, "mamba")
    ops = torch.ops.statespan
    torch.library.opcheck(ops.selective_state_update.default, (*arguments, backend))
    (state, x, dt, A, B, C), more = ssd_inputs()
    arguments = (state, x, dt, A, B, C, more["D"], more["dt_bias"], True, 0.0, math.inf, "zoh")
    torch.library.opcheck(ops.ssd_state_update.default, (*arguments, backend))


@pytest.mark.parametrize(
    ("update", "make"), [(selective_state_update, selective_inputs), (ssd_state_update, ssd_inputs)]
)
def test_compiles_into_one_graph(update, make):
    inputs, options = make()

    def run(*values):
        _, state = update(*values, **options)
        return update(state, *values[1:], **options)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(compiled, run(*inputs), strict=True))


@pytest.mark.parametrize(
    ("place", "shape", "message"),
    [
        (0, (2, 6), r"state must be \[b d n\], got \[2, 6\]"),
        (1, (2, 7), r"u must be \[b d\] = \[2, 6\], got \[2, 7\]"),
        (2, (3, 6), r"dt must be \[b d\] = \[2, 6\], got \[3, 6\]"),
        (3, (6, 4), r"A must be \[d n\] = \[6, 5\], got \[6, 4\]"),
        (4, (2, 4, 5), r"4 groups of B and C must divide d = 6"),
        (5, (2, 1, 5), r"C must be \[b g n\] = \[2, 2, 5\], got \[2, 1, 5\]"),
    ],
)
def test_bad_input_selective(place, shape, message):
    inputs, _ = selective_inputs()
    changed = [torch.zeros(shape) if i == place or (i == 5 and place == 4) else v for i, v in enumerate(inputs)]
    with pytest.raises(UserError, match=message):
        selective_state_update(*changed)


@pytest.mark.parametrize(
    ("place", "shape", "message"),
    [
        (0, (2, 4, 5), r"state must be \[b h p n\], got \[2, 4, 5\]"),
        (1, (2, 4, 4), r"x must be \[b h p\] = \[2, 4, 3\], got \[2, 4, 4\]"),
        (2, (2, 3), r"dt must be \[b h\] = \[2, 4\], got \[2, 3\]"),
        (3, (4, 5), r"A must be \[h\] = \[4\], got \[4, 5\]"),
        (4, (2, 3, 5), r"3 groups of B and C must divide h = 4"),
    ],
)
def test_bad_input_ssd(place, shape, message):
    inputs, _ = ssd_inputs()
    changed = [torch.zeros(shape) if i == place or (i == 5 and place == 4) else v for i, v in enumerate(inputs)]
    with pytest.raises(UserError, match=message):
        ssd_state_update(*changed)


def test_bad_options():
    inputs, options = selective_inputs()
    with pytest.raises(UnknownName, match="did you mean 'bilinear'"):
        selective_state_update(*inputs, discretization="bilinea")
    with pytest.raises(UserError, match=r"z must be \[b d\] = \[2, 6\], got \[2, 5\]"):
        selective_state_update(*inputs, z=options["z"][:, 1:])
    inputs, options = ssd_inputs()
    with pytest.raises(UserError, match=r"D must be \[h\] or \[h p\] = \[4, 3\], got \[3\]"):
        ssd_state_update(*inputs, D=torch.zeros(3))
    with pytest.raises(UnknownName, match="did you mean 'reference'"):
        ssd_state_update(*inputs, backend="referense")
