"""linear with few and many rows against float64, and row-wise int8 quantisation."""

import pytest
import torch
from torch.nn import functional as F

from statespan.errors import BackendUnavailable, UnknownName, UserError
from statespan.ops import linear, quantize_rows

# A result may be this many times as far from float64 as F.linear's in the same dtypes, plus a rounding of the output.
FACTOR = 2.0


def quantized(weight, dtype):
    """The weight as it is stored, its scale, and the float64 matrix it stands for."""
    if dtype is torch.int8:
        values, scale = quantize_rows(weight)
        return values, scale, values.double() * scale.double()[:, None]
    stored = weight.to(dtype)
    return stored, None, stored.double()


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (5, 7), (16, 33), (33, 80), (64, 3), (1536, 50)])
def test_values(inputs, outputs, dtype, x_dtype, backend):
    weight, bias = torch.randn(outputs, inputs), torch.randn(outputs)
    stored, scale, exact_weight = quantized(weight, dtype)
    for rows in (1, 2, 3, 4, 5, 8, 9):
        x = torch.randn(rows, inputs).to(x_dtype)
        for some_bias in (None, bias, bias.bfloat16()):
            y = linear(x, stored, some_bias, scale=scale, backend=backend)
            exact = F.linear(x.double(), exact_weight, None if some_bias is None else some_bias.double())
            plain = F.linear(x.float(), exact_weight.float(), None if some_bias is None else some_bias.float())
            allowed = FACTOR * (plain - exact).abs().max() + torch.finfo(x_dtype).eps * exact.abs().max()
            assert y.dtype == x_dtype and y.shape == (rows, outputs)
            assert (y - exact).abs().max() <= allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_error_is_that_of_f_linear(dtype):
    """Over many outputs the mean error is no larger than that of F.linear in the same dtypes."""
    stored, scale, exact_weight = quantized(torch.randn(2000, 768), dtype)
    x = torch.randn(1, 768)
    exact = F.linear(x.double(), exact_weight)
    ours = (linear(x, stored, scale=scale, backend="cpu") - exact).abs().mean()
    plain = (F.linear(x, exact_weight.float()) - exact).abs().mean()
    assert ours <= FACTOR * plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_many_threads_give_the_same_bits(dtype):
    stored, scale, _ = quantized(torch.randn(700, 500), dtype)
    x = torch.randn(3, 500)
    one = linear(x, stored, scale=scale, backend="cpu")
    torch.set_num_threads(3)
    many = linear(x, stored, scale=scale, backend="cpu")
    torch.set_num_threads(1)
    assert torch.equal(one, many)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_a_row_does_not_depend_on_the_others(dtype):
    """Batched decoding gives each sequence what it gets alone."""
    stored, scale, _ = quantized(torch.randn(40, 100), dtype)
    x = torch.randn(8, 100)
    together = linear(x, stored, scale=scale, backend="cpu")
    for row in range(8):
        alone = linear(x[row : row + 1], stored, scale=scale, backend="cpu")
        assert torch.allclose(together[row], alone[0], rtol=1e-5, atol=1e-5)


def test_shapes_and_strides():
    weight = torch.randn(7, 12)
    for x in (torch.randn(12), torch.randn(2, 1, 12), torch.randn(2, 24)[:, ::2], torch.randn(0, 12)):
        assert torch.allclose(linear(x, weight), F.linear(x, weight), atol=1e-5)
    x = torch.randn(2, 12)
    slices = (weight[::2], torch.randn(12, 7).t(), torch.randn(7, 24)[:, 12:])  # rows apart, transposed, a part
    for part in slices:
        assert torch.allclose(linear(x, part, backend="cpu"), F.linear(x, part), atol=1e-5)


def test_outputs_may_hold_anything_before(nan_in_new_tensors):
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        stored, scale, _ = quantized(torch.randn(21, 19), dtype)
        for x in (torch.randn(5, 19), torch.randn(1, 19).bfloat16()):
            assert linear(x, stored, scale=scale, backend="cpu").isfinite().all()


def test_gradients_are_those_of_f_linear():
    x, weight, bias = (torch.randn(s, requires_grad=True) for s in ((2, 6), (4, 6), (4,)))
    ours = torch.autograd.grad(linear(x, weight, bias).square().sum(), (x, weight, bias))
    plain = torch.autograd.grad(F.linear(x, weight, bias).square().sum(), (x, weight, bias))
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
    values, scale = quantize_rows(weight)
    (grad,) = torch.autograd.grad(linear(x, values, scale=scale).sum(), x)
    assert torch.allclose(grad, (values * scale[:, None]).sum(0).expand(2, 6), atol=1e-5)


def test_autocast_is_that_of_f_linear():
    x, weight = torch.randn(2, 6), torch.randn(4, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = linear(x, weight)
        assert y.dtype == torch.bfloat16 and torch.equal(y, F.linear(x, weight))


def test_quantize_rows():
    weight = torch.randn(5, 300) * torch.tensor([[1e-6], [1.0], [1e4], [0.0], [3.0]])
    weight[4] = torch.linspace(-2, 2, 300)
    values, scale = quantize_rows(weight)
    assert values.dtype == torch.int8 and scale.dtype == torch.float32
    assert torch.equal(scale, weight.abs().amax(1) / 127)
    assert values.abs().amax(1).tolist() == [127, 127, 127, 0, 127], "the range is used, and is symmetric"
    assert values[4, 0] == -127 and values[4, -1] == 127
    left = (weight - values * scale[:, None]).abs()
    assert (left <= scale[:, None] * 0.50001).all()
    assert torch.equal(quantize_rows(weight.bfloat16())[1], weight.bfloat16().float().abs().amax(1) / 127)


def test_opcheck_and_one_graph():
    x, weight = torch.randn(2, 6), torch.randn(4, 6)
    values, scale = quantize_rows(weight)
    op = torch.ops.statespan.linear.default
    torch.library.opcheck(op, (x, weight, torch.randn(4), None, "cpu"))
    torch.library.opcheck(op, (x.bfloat16(), values, None, scale, "auto"))
    torch.library.opcheck(op, (torch.randn(9, 6), values, torch.randn(4), scale, "torch"))

    def run(x):
        return linear(x, weight) + linear(x, values, scale=scale)

    assert torch.equal(torch.compile(run, fullgraph=True, backend="aot_eager")(x), run(x))


def test_bad_input():
    x, weight = torch.randn(2, 6), torch.randn(4, 6)
    values, scale = quantize_rows(weight)
    with pytest.raises(UserError, match=r"x must be \[.. i\] = \[2, 6\], got \[2, 5\]"):
        linear(x[:, 1:], weight)
    with pytest.raises(UserError, match=r"weight must be \[o i\], got \[6\]"):
        linear(x, weight[0])
    with pytest.raises(UserError, match=r"bias must be \[o\] = \[4\], got \[6\]"):
        linear(x, weight, torch.zeros(6))
    with pytest.raises(UserError, match=r"scale must be \[o\] = \[4\], got \[4, 1\]"):
        linear(x, values, scale=scale[:, None])
    with pytest.raises(UserError, match="int8 weights need a scale"):
        linear(x, values)
    with pytest.raises(UserError, match="others take none"):
        linear(x, weight, scale=scale)
    with pytest.raises(BackendUnavailable, match="float64"):
        linear(x.double(), weight.double(), backend="cpu")
    with pytest.raises(UnknownName, match="did you mean 'torch'"):
        linear(x, weight, backend="toch")
