"""rms_norm and gated_rms_norm against the formulas in float64, row by row."""

import math

import pytest
import torch

from statespan.errors import BackendUnavailable, UnknownName, UserError
from statespan.ops import gated_rms_norm, rms_norm
from statespan.ops.rms_norm import in_block

GPU = ["triton"] if torch.cuda.is_available() else []  # conftest.py makes their tests' tensors on the GPU
FAST = ["cpu", *GPU]
BACKENDS = [*FAST, "reference"]
EPS = 1e-5
# The largest difference, as a part of the largest exact value: a few roundings of the output's dtype.
LIMIT = {torch.float32: 2e-6, torch.bfloat16: 2**-8}


def truth(x, weight):
    x = x.double()
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) / x.shape[-1] + EPS) * weight.double()


def gated_truth(x, z, weight, group_size, norm_before_gate):
    x, gate, weight = x.double(), z.double() / (1 + torch.exp(-z.double())), weight.double()
    h = x if norm_before_gate else x * gate
    ones = torch.ones(group_size, dtype=torch.float64)
    h = torch.cat([truth(part, ones) for part in h.split(group_size, dim=-1)], dim=-1) * weight
    return h * gate if norm_before_gate else h


def error(value, exact):
    return ((value.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-3)).item()


def compare(run, exactly, inputs, through=torch.float32):
    """Outputs and every gradient of `run` against those of `exactly` on the same inputs in float64.

    through: the coarsest dtype that gradients pass on their way to an input.
    """
    inputs = [v.detach().requires_grad_() for v in inputs]
    wide = [v.detach().double().requires_grad_() for v in inputs]
    ours, exact = run(*inputs), exactly(*wide)
    upstream = [torch.randn(v.shape).to(v.dtype) for v in ours]
    for value, wanted in zip(ours, exact, strict=True):
        assert error(value, wanted) < LIMIT[value.dtype]
    exact_gradients = torch.autograd.grad(exact, wide, [v.double() for v in upstream])
    for value, wanted in zip(torch.autograd.grad(ours, inputs, upstream), exact_gradients, strict=True):
        assert error(value, wanted) < max(LIMIT[value.dtype], LIMIT[through]), value.shape
    return ours


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [2, 5, 33, 1536])
def test_values_and_gradients(channels, dtype, weight_dtype, backend):
    x, weight = torch.randn(2, 3, channels).to(dtype), torch.randn(channels).to(weight_dtype)

    def run(x, weight):
        return [rms_norm(x, weight, eps=EPS, backend=backend)]

    (y,) = compare(run, lambda x, weight: [truth(x, weight)], (x, weight))
    assert y.dtype == weight_dtype


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [2, 5, 33, 1536])
def test_values_and_gradients_with_residual(channels, residual_dtype, dtype, backend):
    x, residual = torch.randn(2, 3, channels).to(dtype), torch.randn(2, 3, channels).to(residual_dtype)

    def run(x, residual, weight):
        return rms_norm(x, weight, eps=EPS, residual=residual, backend=backend)

    def exactly(x, residual, weight):
        total = x + residual
        rounded = total.detach().to(residual_dtype).double()  # what is kept is what is normalised
        return truth(total + (rounded - total.detach()), weight), total

    y, total = compare(run, exactly, (x, residual, torch.randn(channels)), through=residual_dtype)
    assert y.dtype == torch.float32 and total.dtype == residual_dtype


@pytest.mark.parametrize("backend", FAST)
def test_one_channel_is_a_sign(backend):
    x = torch.tensor([[3.0], [-2.0], [0.0]])
    y = rms_norm(x, torch.tensor([2.0]), eps=EPS, backend=backend)
    assert torch.allclose(y, torch.tensor([[2.0], [-2.0], [0.0]]), atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("channels", "group_size"), [(2, None), (5, 5), (66, 33), (1536, None), (1536, 192), (40, 2)])
def test_gated_values_and_gradients(channels, group_size, dtype, norm_before_gate, backend):
    """x and z are strided slices of one projection, as in the mixer."""
    x, z = torch.randn(2, 3, 2 * channels + 1).to(dtype)[..., 1:].split(channels, dim=-1)
    options = {"eps": EPS, "group_size": group_size, "norm_before_gate": norm_before_gate, "backend": backend}

    def exactly(x, z, weight):
        return [gated_truth(x, z, weight, group_size or channels, norm_before_gate)]

    (y,) = compare(lambda *v: [gated_rms_norm(*v, **options)], exactly, (x, z, torch.randn(channels)))
    assert y.dtype == dtype


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_and_tiny_values(backend):
    x = torch.randn(4, 50) * torch.tensor([[1e-20], [1e-3], [1e3], [1e15]])
    z = torch.tensor([-100.0, -30.0, 0.0, 30.0, 100.0]).repeat(10).expand(4, 50)
    weight = torch.ones(50)
    for row in range(4):
        y = rms_norm(x[row], weight, eps=EPS, backend=backend)
        assert error(y, truth(x[row], weight)) < 2e-6
        y = gated_rms_norm(x[row], z[row], weight, eps=EPS, backend=backend)
        assert error(y, gated_truth(x[row], z[row], weight, 50, False)) < 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_decides_the_dtype(backend):
    x, residual, weight = torch.randn(3, 8), torch.randn(3, 8), torch.randn(8)
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        y, total = rms_norm(x, weight, eps=EPS, residual=residual, backend=backend)
        assert y.dtype == torch.bfloat16 and total.dtype == torch.float32
        assert rms_norm(x, weight, eps=EPS, backend=backend).dtype == torch.bfloat16
    assert torch.equal(y, rms_norm(x, weight, eps=EPS, residual=residual, backend=backend)[0].to(torch.bfloat16))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("shape", [(4097, 768), (300, 5120), (70000, 3), (2, 40000)])
def test_large_sizes_and_repeated_bits(shape, backend):
    """Sizes at which programs take many rows each, against float64; the sums over rows repeat bit by bit."""
    x, residual, z = (torch.randn(shape).bfloat16() for _ in range(3))
    weight = torch.randn(shape[1])

    def run(x, residual, weight):
        return rms_norm(x, weight, eps=EPS, residual=residual, backend=backend)

    def exactly(x, residual, weight):
        total = x + residual
        return truth(total, weight), total

    compare(run, exactly, (x, residual.float(), weight))
    compare(
        lambda *v: [gated_rms_norm(*v, eps=EPS, backend=backend)],
        lambda x, z, weight: [gated_truth(x, z, weight, shape[1], False)],
        (x, z, weight),
    )
    leaf = weight.requires_grad_()
    upstream = torch.randn(shape)
    first, second = (
        torch.autograd.grad(rms_norm(x, leaf, eps=EPS, backend=backend), leaf, upstream)[0] for _ in range(2)
    )
    assert torch.equal(first, second)


def test_many_threads_give_the_same_bits():
    x = torch.randn(3000, 64).requires_grad_()
    z, weight = torch.randn(3000, 64).requires_grad_(), torch.randn(64).requires_grad_()
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        y = rms_norm(x, weight, eps=EPS, backend="cpu")
        gated = gated_rms_norm(x, z, weight, eps=EPS, group_size=32, backend="cpu")
        results.append((y, gated, *torch.autograd.grad((y.square().sum() + gated.square().sum()), (x, z, weight))))
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("backend", FAST)
def test_scratch_and_outputs_may_hold_anything_before(backend, nan_in_new_tensors):
    x = torch.randn(2, 3, 21).requires_grad_()
    z, residual = torch.randn(2, 3, 21).requires_grad_(), torch.randn(2, 3, 21).requires_grad_()
    weight = torch.randn(21).requires_grad_()
    outputs = rms_norm(x, weight, eps=EPS, residual=residual, backend=backend)
    gated = gated_rms_norm(x, z, weight, eps=EPS, group_size=7, backend=backend)
    total = sum(v.sum() for v in (*outputs, gated))
    assert total.isfinite() and all(v.isfinite().all() for v in torch.autograd.grad(total, (x, z, residual, weight)))


@pytest.mark.parametrize("backend", FAST)
def test_any_strides_and_no_rows(backend):
    x, z, weight = torch.randn(4, 6, 10), torch.randn(4, 6, 10), torch.randn(10)
    for view in (lambda v: v.transpose(0, 1), lambda v: v.transpose(1, 2), lambda v: v[:, ::2], lambda v: v[..., ::2]):
        a, b = view(x), view(z)
        w = weight.repeat(2)[: a.shape[-1] * 2 : 2]
        assert torch.equal(
            rms_norm(a, w, eps=EPS, residual=b, backend=backend)[0],
            rms_norm(a.contiguous(), w.contiguous(), eps=EPS, residual=b.contiguous(), backend=backend)[0],
        )
        assert torch.equal(
            gated_rms_norm(a, b, w, eps=EPS, backend=backend),
            gated_rms_norm(a.contiguous(), b.contiguous(), w.contiguous(), eps=EPS, backend=backend),
        )
    assert rms_norm(x[:0], weight, eps=EPS, backend=backend).shape == (0, 6, 10)


def test_float64_runs_and_is_exact():
    x, z, weight = torch.randn(3, 7).double(), torch.randn(3, 7).double(), torch.randn(7).double()
    assert error(rms_norm(x, weight, eps=EPS), truth(x, weight)) < 1e-15
    assert error(gated_rms_norm(x, z, weight, eps=EPS), gated_truth(x, z, weight, 7, False)) < 1e-15
    with pytest.raises(BackendUnavailable, match="float64"):
        rms_norm(x, weight, eps=EPS, backend="cpu")


def test_gradcheck():
    x, z, weight = (torch.randn(s).double().requires_grad_() for s in ((2, 6), (2, 6), (6,)))
    assert torch.autograd.gradcheck(lambda *v: rms_norm(v[0], v[2], eps=EPS, residual=v[1]), (x, z, weight))
    assert torch.autograd.gradcheck(lambda *v: gated_rms_norm(*v, eps=EPS, group_size=3), (x, z, weight))
    assert torch.autograd.gradcheck(lambda *v: gated_rms_norm(*v, eps=EPS, norm_before_gate=True), (x, z, weight))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    x, z, weight = (torch.randn(s).requires_grad_() for s in ((2, 3, 6), (2, 3, 6), (6,)))
    ops = torch.ops.statespan
    torch.library.opcheck(ops.rms_norm.default, (x, weight, EPS, torch.bfloat16, backend))
    torch.library.opcheck(ops.add_rms_norm.default, (x, z, weight, EPS, torch.float32, backend))
    torch.library.opcheck(ops.gated_rms_norm.default, (x, z, weight, EPS, 3, False, backend))
    plain = [v.detach() for v in (x, z, weight)]
    torch.library.opcheck(ops.rms_norm_backward.default, (plain[0], None, plain[1], plain[2], EPS, backend))
    torch.library.opcheck(ops.gated_rms_norm_backward.default, (plain[0], *plain, EPS, 3, True, backend))


@pytest.mark.parametrize("backend", ["auto", *GPU])
@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_into_one_graph(autocast, backend):
    x, z, weight = (torch.randn(s).requires_grad_() for s in ((2, 3, 6), (2, 3, 6), (6,)))

    def run(x, z, weight):
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=autocast):
            y, total = rms_norm(x, weight, eps=EPS, residual=z, backend=backend)
            return gated_rms_norm(y, z.to(y.dtype), weight, eps=EPS, group_size=3, backend=backend).float() + total

    compiled, wanted = torch.compile(run, fullgraph=True, backend="aot_eager")(x, z, weight), run(x, z, weight)
    assert torch.equal(compiled, wanted)
    for a, b in zip(*(torch.autograd.grad(v.square().sum(), (x, z, weight)) for v in (compiled, wanted)), strict=True):
        assert torch.allclose(a, b)


def test_bad_input():
    x, weight = torch.randn(2, 3, 6), torch.randn(6)
    with pytest.raises(UserError, match=r"weight must be \[d\] = \[6\], got \[5\]"):
        rms_norm(x, weight[1:], eps=EPS)
    with pytest.raises(UserError, match=r"residual must be \[.. d\] = \[2, 3, 6\], got \[2, 6\]"):
        rms_norm(x, weight, eps=EPS, residual=x[:, 0])
    with pytest.raises(UserError, match=r"z must be \[.. d\] = \[2, 3, 6\], got \[2, 2, 6\]"):
        gated_rms_norm(x, x[:, 1:], weight, eps=EPS)
    with pytest.raises(UserError, match="group_size 4 must divide d = 6"):
        gated_rms_norm(x, x, weight, eps=EPS, group_size=4)
    with pytest.raises(UserError, match="group_size 0 must divide d = 6"):
        gated_rms_norm(x, x, weight, eps=EPS, group_size=0)
    with pytest.raises(UnknownName, match="did you mean 'cpu'"):
        rms_norm(x, weight, eps=EPS, backend="cpus")
    assert math.isfinite(rms_norm(x, weight, eps=0.0).sum().item())


@pytest.mark.parametrize("backend", ["torch", *GPU])
@pytest.mark.parametrize("update_dtype", [None, torch.bfloat16, torch.float32])
def test_gradients_from_the_output_alone(backend, update_dtype):
    """As a block keeps it: x / rms(x) comes back from y / weight, for tiny weights and for 0, too."""
    device = "cuda" if backend == "triton" else "cpu"
    hidden, weight = torch.randn(3, 70, 96, device=device), torch.randn(96, device=device)
    weight[3], weight[5], weight[7] = 0, 1e-20, -1e-6
    update = None if update_dtype is None else torch.randn(hidden.shape, device=device).to(update_dtype)
    normed = in_block.forward(hidden, update, weight, EPS, torch.bfloat16, True)
    x = hidden if update is None else hidden + update
    assert error(normed.y, truth(x, weight)) < 2**-8
    assert error(normed.inverses, (x.double().square().mean(-1) + EPS).rsqrt()) < 2e-6

    grad_y, grad_total = (torch.randn(x.shape, device=device) for _ in range(2))
    found = in_block.backward(
        grad_y.bfloat16(), grad_total, normed.y, normed.inverses, weight, EPS, torch.float32, update_dtype
    )
    wide = [x.double().requires_grad_(), weight.double().requires_grad_()]
    of_x, of_weight = torch.autograd.grad(truth(*wide), wide, grad_y.bfloat16().double())
    grad, grad_update, y, grad_weight = found
    # x / rms comes back with the rounding of y, at most 2^-9 of it, and so do the terms that it is in.
    normal = x.double() * (x.double().square().mean(-1, keepdim=True) + EPS).rsqrt()
    terms = (grad_y.bfloat16().double() * normal).abs()
    along = (terms * weight.double().abs()).mean(-1, keepdim=True)
    limit = 2 * 2**-9 * normal.abs() * along * normed.inverses.double().unsqueeze(-1)
    assert ((grad - of_x - grad_total).abs() <= limit + 1e-5).all() and grad.dtype == torch.float32
    assert ((grad_weight - of_weight).abs() <= 2**-9 * terms.sum((0, 1)) + 1e-5).all()
    assert (grad_update is None) is (update_dtype is None) and y is normed.y
    if grad_update is not None:
        assert torch.equal(grad_update, grad.to(update_dtype))
