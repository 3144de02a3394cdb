"""causal_conv1d and its one-token form against a float64 loop over rows and tokens."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from statespan.errors import BackendUnavailable, UnknownName, UserError
from statespan.ops import causal_conv1d, causal_conv1d_update
from statespan.ops.causal_conv1d import backends

GPU = ["cuda", "triton"] if torch.cuda.is_available() else []  # conftest.py makes their tests' tensors on the GPU
FAST = ["cpu", *GPU]
OF_STEPS = ["cpu", *GPU[1:]]
BACKENDS = [*FAST, "torch", "reference"]
UPDATE = {"cuda": "triton"}  # the update has no CUDA kernel
LIMIT = {torch.float32: 2e-6, torch.bfloat16: 2**-7}  # of the largest value: a few roundings of the dtype


def truth(x, weight, bias, initial_state, segments, silu=True):
    """Plain Python over rows and tokens, in float64 and differentiable."""
    x, weight = x.double(), weight.double()
    batch, length, channels = x.shape
    history = weight.shape[1] - 1
    outputs, states = [], []
    for b in range(batch):
        window = [x.new_zeros(channels)] * history if initial_state is None else list(initial_state[b].double())
        current = None
        for t in range(length):
            segment = 0 if segments is None else int(segments[b, t])
            if segment < 0:
                outputs.append(x.new_zeros(channels))
                continue
            if current is not None and segment != current:
                window = [x.new_zeros(channels)] * history
            current = segment
            window = [*window, x[b, t]]
            y = sum(weight[:, i] * row for i, row in enumerate(window))
            y = y if bias is None else y + bias.double()
            outputs.append(F.silu(y) if silu else y)
            window = window[1:]
        states.append(torch.stack(window) if window else x.new_zeros(0, channels))
    return torch.stack(outputs).view(x.shape), torch.stack(states)


def error(value: Tensor, exact: Tensor) -> float:
    """The largest difference, as a part of the largest exact value."""
    if exact.numel() == 0:
        assert value.shape == exact.shape
        return 0.0
    return ((value.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-3)).item()


def make(batch=2, length=9, channels=5, taps=4, dtype=torch.float32, state=True):
    """x (a strided slice, as it comes from in_proj), weight, bias and the initial state."""
    x = torch.randn(batch, length, 2 * channels + 1).to(dtype)[..., 1 : 1 + channels]
    weight, bias = torch.randn(channels, taps), torch.randn(channels)
    initial_state = torch.randn(batch, taps - 1, channels).to(dtype) if state else None
    return x, weight, bias, initial_state


def gradients(outputs, inputs, upstream):
    """Gradients of inputs; zeros where an output does not depend on one."""
    pairs = [(output, grad) for output, grad in zip(outputs, upstream, strict=True) if output.requires_grad]
    if not pairs:
        return [torch.zeros_like(v) for v in inputs]
    outputs, upstream = zip(*pairs, strict=True)
    return torch.autograd.grad(outputs, inputs, upstream, allow_unused=True, materialize_grads=True, retain_graph=True)


def check_all(x, weight, bias, initial_state, segments, backend, silu=True):
    """Output, final state and every gradient against the truth."""
    inputs = [v.detach().requires_grad_() for v in (x, weight, bias, initial_state) if v is not None]
    rebuilt = iter(inputs)
    x, weight, bias, initial_state = (None if v is None else next(rebuilt) for v in (x, weight, bias, initial_state))
    exact = truth(x, weight, bias, initial_state, segments, silu)
    ours = causal_conv1d(
        x,
        weight,
        bias,
        activation="silu" if silu else None,
        initial_state=initial_state,
        segments=segments,
        return_final_state=True,
        backend=backend,
    )
    limit = LIMIT[x.dtype]
    assert ours[0].dtype == ours[1].dtype == x.dtype
    upstream = [torch.randn(v.shape).to(x.dtype) for v in exact]
    exact_gradients = gradients(exact, inputs, [v.double() for v in upstream])
    for value, wanted in zip((*ours, *gradients(ours, inputs, upstream)), (*exact, *exact_gradients), strict=True):
        # A sum over all tokens rounds once for each of them.
        assert error(value, wanted) < limit * (4 if wanted.shape in (weight.shape, (weight.shape[0],)) else 1)


SEGMENTS = {
    "one": [[0] * 9, [3] * 9],
    "packed": [[0, 0, 0, 0, 1, 1, 1, 1, 1], [5, 6, 6, 7, 7, 7, 8, 8, 8]],
    "left padding": [[-1, -1, -1, 0, 0, 0, 0, 0, 0], [-1, -1, -1, -1, -1, -1, -1, -1, 2]],
    "right padding": [[0, 0, 0, 0, 0, 0, -1, -1, -1], [1, 1, -1, -1, -1, -1, -1, -1, -1]],
    "padding inside": [[0, -1, 0, 0, -1, -1, 0, 1, -1], [0, 0, -1, 1, 1, -1, 1, 0, 0]],
    "all padding": [[-1] * 9, [-2, -1, -3, -1, -1, -1, -1, -1, -1]],
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [None, *SEGMENTS])
def test_segments_values_and_gradients(backend, kind):
    segments = None if kind is None else torch.tensor(SEGMENTS[kind])
    check_all(*make(), segments, backend)
    check_all(*make(state=False), segments, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("taps", range(1, 9))
def test_taps_and_lengths(backend, taps):
    for length in (1, 2, 3, taps, 13):
        check_all(*make(length=length, taps=taps), None, backend)
        check_all(*make(length=length, taps=taps), torch.randint(-1, 3, (2, length)), backend)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_taps_and_bias_in_bfloat16(dtype, biased, backend):
    x, weight, bias, state = make(length=70, channels=66, dtype=dtype)
    weight, bias = weight.bfloat16(), bias.bfloat16() if biased else None
    exact = truth(x, weight, bias, state, None)
    ours = causal_conv1d(x, weight, bias, initial_state=state, return_final_state=True, backend=backend)
    assert all(error(one, other) < LIMIT[dtype] for one, other in zip(ours, exact, strict=True))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [1, 5, 33, 1536])
def test_channels_and_dtypes(channels, dtype, backend):
    segments = torch.tensor([[0] * 6 + [1] * 7, [-1] * 2 + [0] * 11])
    for silu in (True, False):
        check_all(*make(length=13, channels=channels, dtype=dtype), segments, backend, silu)
        x, weight, _, state = make(length=13, channels=channels, dtype=dtype)
        check_all(x, weight, None, state, None, backend, silu)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("length", [63, 257, 1000])
@pytest.mark.parametrize("kind", ["none", "packed", "long padding"])
def test_long_rows(kind, length, backend):
    """Rows cut into many strips, and runs of padding longer than a strip, against the plain PyTorch form in float64."""
    inputs = make(length=length, channels=200, dtype=torch.bfloat16)
    numbers = torch.arange(length)
    segments = {
        "none": None,
        "packed": torch.stack([numbers // 37, numbers // 3]),
        "long padding": torch.stack([numbers // 50, torch.where((numbers > 1) & (numbers < length - 2), -1, 4)]),
    }[kind]
    leaves = [v.detach().requires_grad_() for v in inputs]
    wide = [v.detach().double().requires_grad_() for v in inputs]
    found, exact = (
        causal_conv1d(*v[:3], initial_state=v[3], segments=segments, return_final_state=True, backend=name)
        for v, name in ((leaves, backend), (wide, "torch"))
    )
    upstream = [torch.randn(v.shape).to(torch.bfloat16) for v in found]
    ours = gradients(found, leaves, upstream)
    wanted = gradients(exact, wide, [v.double() for v in upstream])
    for value, right in zip((*found, *ours), (*exact, *wanted), strict=True):
        assert error(value, right) < LIMIT[torch.bfloat16]
    assert all(torch.equal(a, b) for a, b in zip(ours, gradients(found, leaves, upstream), strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(backend):
    x, weight, bias, state = make()
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        inside = causal_conv1d(x, weight, bias, initial_state=state, backend=backend)
    assert torch.equal(inside, causal_conv1d(x, weight, bias, initial_state=state, backend=backend))


def test_many_threads_and_batches_give_the_same_bits():
    x, weight, bias, state = make(batch=3, length=40, channels=300)
    segments = torch.randint(0, 3, (3, 40)).sort(1).values
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        leaves = [v.detach().requires_grad_() for v in (x, weight, bias, state)]
        y = causal_conv1d(*leaves[:3], initial_state=leaves[3], segments=segments, backend="cpu")
        results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    torch.set_num_threads(1)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_chunks_equal_the_whole(backend):
    """A chunk's first real token continues the carried segment, so rows are cut inside of segments and padding."""
    x, weight, bias, state = make(length=12)
    segments = torch.tensor([[0, 0, -1, 0, 1, 1, 1, 1, 1, -1, 2, 2], [-1, -1, 0, 0, 0, 0, 0, 0, 0, 0, 0, -1]])
    whole, final = causal_conv1d(
        x, weight, bias, initial_state=state, segments=segments, return_final_state=True, backend=backend
    )
    pieces, carried = [], state
    for start, stop in ((0, 1), (1, 3), (3, 7), (7, 12)):
        y, carried = causal_conv1d(
            x[:, start:stop],
            weight,
            bias,
            initial_state=carried,
            segments=segments[:, start:stop],
            return_final_state=True,
            backend=backend,
        )
        pieces.append(y)
    assert torch.allclose(torch.cat(pieces, 1), whole, atol=1e-6)
    assert torch.equal(carried, final)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_segments_equal_separate_sequences(backend):
    x, weight, bias, _ = make(batch=1, length=13)
    segments = torch.tensor([[4] * 2 + [5] * 6 + [9] * 5])
    packed = causal_conv1d(x, weight, bias, segments=segments, backend=backend)
    alone = [causal_conv1d(part, weight, bias, backend=backend) for part in x.split([2, 6, 5], dim=1)]
    assert torch.allclose(packed, torch.cat(alone, dim=1), atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_is_invisible_even_when_it_is_nan(backend):
    x, weight, bias, state = make(length=8)
    segments = torch.tensor([[-1, 0, 0, -1, -1, 0, 0, -1], [0, 0, -1, 0, 0, 0, -1, -1]])
    real = segments >= 0
    filled = x.masked_fill(~real[..., None], torch.nan).requires_grad_()
    y, final = causal_conv1d(
        filled, weight, bias, initial_state=state, segments=segments, return_final_state=True, backend=backend
    )
    (grad,) = torch.autograd.grad(y.sum() + final.sum(), filled)
    assert not y.isnan().any() and not grad.isnan().any()
    for b in range(2):
        alone, last = causal_conv1d(
            x[b : b + 1, real[b]],
            weight,
            bias,
            initial_state=state[b : b + 1],
            return_final_state=True,
            backend=backend,
        )
        assert torch.allclose(y[b, real[b]], alone[0], atol=1e-6) and not y[b, ~real[b]].any()
        assert torch.equal(final[b], last[0]) and not grad[b, ~real[b]].any()


@pytest.mark.parametrize("backend", [*OF_STEPS, "reference"])
@pytest.mark.parametrize(("channels", "taps"), [(1, 1), (5, 4), (33, 2), (1536, 4), (40, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_equal_the_scan(backend, channels, taps, dtype):
    x, weight, bias, state = make(length=6, channels=channels, taps=taps, dtype=dtype)
    weight, bias = weight.to(dtype), bias.to(dtype)
    exact, last = truth(x, weight, bias, state, None)
    outputs, before = [], state.clone()
    carried = state
    for t in range(6):
        y, carried = causal_conv1d_update(carried, x[:, t], weight, bias, backend=backend)
        outputs.append(y)
    assert error(torch.stack(outputs, 1), exact) < LIMIT[dtype]
    assert torch.equal(carried.double(), last) and carried.dtype == dtype
    assert torch.equal(state, before), "the state that went in is left as it is"


@pytest.mark.parametrize("backend", OF_STEPS)
def test_step_without_bias_and_activation(backend):
    x, weight, _, state = make(length=1)
    y, _ = causal_conv1d_update(state, x[:, 0], weight, activation=None, backend=backend)
    assert error(y, truth(x, weight, None, state, None, silu=False)[0][:, 0]) < 1e-6


def test_step_gradients_come_from_the_reference():
    x, weight, bias, state = make(length=1)
    leaves = [v.detach().requires_grad_() for v in (state, x[:, 0], weight, bias)]
    y, carried = causal_conv1d_update(*leaves)
    exact = truth(leaves[1][:, None], *leaves[2:], leaves[0], None)
    ours = torch.autograd.grad(y.sum() + carried.square().sum(), leaves)
    wanted = torch.autograd.grad(exact[0].sum() + exact[1].square().sum(), leaves)
    assert all(error(a, b.double()) < 1e-6 for a, b in zip(ours, wanted, strict=True))
    with pytest.raises(UserError, match="no gradients"):
        causal_conv1d_update(*leaves, backend="cpu")


@pytest.mark.parametrize("backend", FAST)
def test_scratch_and_outputs_may_hold_anything_before(backend, nan_in_new_tensors):
    segments = torch.tensor([[0, 0, 0, -1, 1, 1, 1, 1, 1], [-1, 2, 3, 3, 3, 3, 3, 3, 3]])
    check_all(*make(channels=21), segments, backend)
    check_all(*make(channels=21, state=False), None, backend)
    x, weight, bias, state = make(length=1)
    y, carried = causal_conv1d_update(state, x[:, 0], weight, bias, backend=UPDATE.get(backend, backend))
    assert y.isfinite().all() and carried.isfinite().all()


@pytest.mark.parametrize("backend", FAST)
def test_any_strides(backend):
    x, weight, bias, state = make()
    wanted = causal_conv1d(x, weight, bias, initial_state=state, backend=backend)
    swapped = x.transpose(1, 2).contiguous().transpose(1, 2)  # channels are not contiguous
    strided_state = state.transpose(1, 2).contiguous().transpose(1, 2)
    y = causal_conv1d(swapped, weight.t().contiguous().t(), bias, initial_state=strided_state, backend=backend)
    assert torch.equal(y, wanted)
    leaf = x.detach().requires_grad_()
    y = causal_conv1d(leaf, weight, bias, backend=backend)
    (expanded,) = torch.autograd.grad(y.sum(), leaf, retain_graph=True)  # the gradient of a sum has no strides
    (plain,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
    assert torch.equal(expanded, plain)


def test_float64_runs_and_is_exact():
    x, weight, bias, state = (v.double() for v in make())
    y, final = causal_conv1d(x, weight, bias, initial_state=state, return_final_state=True)
    exact = truth(x, weight, bias, state, None)
    assert error(y, exact[0]) < 1e-14 and torch.equal(final, exact[1])
    with pytest.raises(BackendUnavailable, match="float64"):
        causal_conv1d(x, weight, bias, backend="cpu")


def test_gradcheck_of_the_reference():
    x, weight, bias, state = (v.double().requires_grad_() for v in make(batch=1, length=4, channels=2, taps=3))
    segments = torch.tensor([[0, -1, 0, 1]])

    def run(x, weight, bias, state):
        return causal_conv1d(
            x, weight, bias, initial_state=state, segments=segments, return_final_state=True, backend="reference"
        )

    assert torch.autograd.gradcheck(run, (x, weight, bias, state))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    x, weight, bias, state = make(channels=6)
    leaves = [v.detach().clone().requires_grad_() for v in (x, weight, bias, state)]
    segments = torch.tensor(SEGMENTS["packed"])
    ops = torch.ops.statespan
    torch.library.opcheck(ops.causal_conv1d.default, (*leaves, segments, True, backend))
    torch.library.opcheck(ops.causal_conv1d.default, (x, weight, None, None, None, False, backend))
    y, final = (torch.randn(2, 9, 6), torch.randn(2, 3, 6))
    torch.library.opcheck(
        ops.causal_conv1d_backward.default, (y, final, x, weight, bias, state, segments, True, backend)
    )
    if backend != "torch":
        update = UPDATE.get(backend, backend)
        torch.library.opcheck(ops.causal_conv1d_update.default, (state, x[:, 0], weight, bias, True, update))


def test_compiles_into_one_graph():
    x, weight, bias, state = make()
    segments = torch.tensor(SEGMENTS["packed"])

    def run(x, weight):
        y, final = causal_conv1d(x, weight, bias, initial_state=state, segments=segments, return_final_state=True)
        step, final = causal_conv1d_update(final.detach(), x[:, 0].detach(), weight.detach(), bias)
        return y.sum() + step.sum() + final.sum()

    leaves = [v.detach().requires_grad_() for v in (x, weight)]
    wanted = run(*leaves)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(*leaves)
    assert torch.allclose(compiled, wanted)
    for a, b in zip(torch.autograd.grad(compiled, leaves), torch.autograd.grad(wanted, leaves), strict=True):
        assert torch.allclose(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(4, 4)}, r"weight must be \[d k\] = \[5, 4\], got \[4, 4\]"),
        ({"weight": torch.zeros(5, 1, 4)}, r"weight must be \[d k\], got \[5, 1, 4\]"),
        ({"bias": torch.zeros(4)}, r"bias must be \[d\] = \[5\], got \[4\]"),
        ({"x": torch.zeros(9, 5)}, r"x must be \[b t d\], got \[9, 5\]"),
        ({"initial_state": torch.zeros(2, 4, 5)}, r"initial_state must be .* = \[2, 3, 5\], got \[2, 4, 5\]"),
        ({"segments": torch.zeros(2, 8)}, r"segments must be \[b t\] = \[2, 9\], got \[2, 8\]"),
        ({"activation": "sillu"}, "did you mean 'silu'"),
        ({"backend": "cpuu"}, "did you mean 'cpu'"),
    ],
)
def test_bad_input(change, message):
    x, weight, bias, state = make()
    arguments = {"x": x, "weight": weight, "bias": bias, "initial_state": state, **change}
    with pytest.raises(UserError, match=message):
        causal_conv1d(**arguments)


def test_bad_input_of_the_step():
    x, weight, bias, state = make()
    with pytest.raises(UserError, match=r"state must be .* = \[2, 3, 5\], got \[2, 2, 5\]"):
        causal_conv1d_update(state[:, 1:], x[:, 0], weight, bias)
    with pytest.raises(UserError, match=r"x must be \[b d\], got \[2, 9, 5\]"):
        causal_conv1d_update(state, x, weight, bias)
    with pytest.raises(UnknownName):
        causal_conv1d_update(state, x[:, 0], weight, bias, activation="relu")


@pytest.mark.parametrize("backend", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
@pytest.mark.parametrize("kind", ["plain", "final state", "packed"])
@pytest.mark.parametrize(
    ("batch", "length", "channels", "inner", "taps"),
    [(2, 70, 320, 96, 4), (1, 1, 64, 16, 4), (3, 333, 128, 160, 3), (1, 2, 192, 48, 2), (2, 9, 24, 5, 4)],
)
def test_gradients_behind_a_product(batch, length, channels, inner, taps, kind, backend):
    """What a block adds through x_proj: in bfloat16 one kernel on a GPU."""
    low = torch.bfloat16
    weight, bias = torch.randn(channels, taps), torch.randn(channels) if taps > 2 else None
    x = torch.randn(batch, length, 2 * channels).to(low)[..., :channels]
    grad_y, matrix = torch.randn(batch, length, channels).to(low), (torch.randn(inner, channels) / inner**0.5).to(low)
    through = torch.randn(batch, length, inner).to(low)
    grad_state, state, segments = torch.randn(batch, taps - 1, channels).to(low), None, None
    if kind == "packed":
        state = torch.randn(batch, taps - 1, channels).to(low)
        segments = (torch.rand(batch, length) < 0.1).cumsum(1).masked_fill(torch.rand(batch, length) < 0.2, -1)
    leaves = [None if value is None else value.double().requires_grad_() for value in (x, weight, bias, state)]
    inputs = [leaf for leaf in leaves if leaf is not None]
    count = 1 if kind == "plain" else 2
    upstream = (grad_y.double() + through.double() @ matrix.double(), grad_state)[:count]
    exact = iter(torch.autograd.grad(truth(*leaves, segments)[:count], inputs, upstream, materialize_grads=True))

    into = torch.full((batch, length, 2 * channels), torch.nan, dtype=low)
    given = (None if kind == "plain" else grad_state, x, weight, bias, state, segments, into[..., :channels])
    found = backends.backward_behind(grad_y.clone(), through, matrix, *given)
    assert into[..., channels:].isnan().all()
    for value, leaf in zip((into[..., :channels], *found[1:]), leaves, strict=True):
        if leaf is None:
            assert value.numel() == 0
        else:
            assert error(value, next(exact)) < LIMIT[low], value.shape


@pytest.mark.parametrize(("rows", "taps", "taken"), [(2, 8, True), (2, 9, False), (1 << 16, 4, False)])
def test_what_the_cuda_kernels_take(rows, taps, taken, monkeypatch):
    limits = []

    def resolve(*_, too_large):
        limits.append(too_large)
        return "reference"

    monkeypatch.setattr(backends, "resolve", resolve)
    backends.forward(torch.zeros(rows, 1, 2), torch.zeros(2, taps), None, None, None, True, "auto")
    assert [name for name, _ in limits[0]] == ([] if taken else ["cuda"])
