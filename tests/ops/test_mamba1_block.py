"""mamba1_block against the ops that it is made of, in float64 through their references: values and every gradient."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from statespan.errors import UserError
from statespan.ops import causal_conv1d, mamba1_block, rms_norm, selective_scan
from statespan.ops.mamba1_block import inner

BATCH, SIZE, CHANNELS, STATES, RANK, TAPS = 2, 16, 24, 8, 3, 4
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
NAMES = (
    "hidden update norm in_proj in_bias conv_weight conv_bias x_proj dt_norm B_norm C_norm dt_proj dt_bias A_log D"
    " out_proj out_bias initial_conv initial_state"
)


def problem(length: int, *, states: bool, dtype: torch.dtype = torch.float64, **kinds: bool) -> dict[str, Tensor]:
    """Random inputs by name; `norms` and `bias` say which optional ones are there."""
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    found = {
        "hidden": normal(BATCH, length, SIZE),
        "norm": normal(SIZE),
        "in_proj": normal(2 * CHANNELS, SIZE) / SIZE**0.5,
        "out_proj": normal(SIZE, CHANNELS) / CHANNELS**0.5,
        "conv_weight": normal(CHANNELS, TAPS) / 2,
        "x_proj": normal(RANK + 2 * STATES, CHANNELS) / CHANNELS**0.5,
        "dt_proj": normal(CHANNELS, RANK) / RANK**0.5,
        "dt_bias": normal(CHANNELS) - 2,
        "A_log": normal(CHANNELS, STATES),
        "D": normal(CHANNELS),
    }
    if kinds.get("bias", True):
        found |= {"conv_bias": normal(CHANNELS), "in_bias": normal(2 * CHANNELS), "out_bias": normal(SIZE)}
    if kinds.get("update", True):
        found["update"] = normal(BATCH, length, SIZE)
    if kinds.get("norms"):
        found |= {"dt_norm": normal(RANK), "B_norm": normal(STATES), "C_norm": normal(STATES)}
    if states:
        found |= {"initial_conv": normal(BATCH, TAPS - 1, CHANNELS), "initial_state": normal(BATCH, CHANNELS, STATES)}
    return {name: found[name].to(dtype) for name in NAMES.split() if name in found}


def in_parts(
    segments: Tensor | None, discretization: str, backend: str = "reference", **t: Tensor
) -> tuple[Tensor, ...]:
    """The equations, op by op, by the references."""
    total, norm = t["hidden"], {"eps": 1e-5, "backend": backend}
    if "update" in t:
        normed, total = rms_norm(t["update"], t["norm"], residual=total, **norm)
    else:
        normed = rms_norm(total, t["norm"], **norm)
    x, z = F.linear(normed, t["in_proj"], t.get("in_bias")).chunk(2, dim=-1)
    u, conv = causal_conv1d(
        x,
        t["conv_weight"],
        t.get("conv_bias"),
        initial_state=t.get("initial_conv"),
        segments=segments,
        return_final_state=True,
        backend=backend,
    )
    dt, B, C = F.linear(u, t["x_proj"]).split([RANK, STATES, STATES], dim=-1)
    if "dt_norm" in t:
        pairs = ((dt, t["dt_norm"]), (B, t["B_norm"]), (C, t["C_norm"]))
        dt, B, C = (rms_norm(part, weight, **norm) for part, weight in pairs)
    y, state = selective_scan(
        u,
        F.linear(dt, t["dt_proj"]),
        -t["A_log"].exp(),
        B.unsqueeze(2),
        C.unsqueeze(2),
        t["D"],
        z,
        dt_bias=t["dt_bias"],
        initial_state=t.get("initial_state"),
        segments=segments,
        return_final_state=True,
        discretization=discretization,
        backend=backend,
    )
    return total, F.linear(y, t["out_proj"], t.get("out_bias")), conv, state


def at_once(
    segments: Tensor | None,
    discretization: str,
    keep_projected: bool = True,
    keep_convolved: bool = False,
    **t: Tensor,
) -> tuple[Tensor, ...]:
    norms = (t["dt_norm"], t["B_norm"], t["C_norm"]) if "dt_norm" in t else None
    names = "hidden update norm in_proj in_bias conv_weight conv_bias x_proj dt_proj dt_bias A_log D out_proj out_bias"
    return mamba1_block(
        *(t.get(name) for name in names.split()),  # type: ignore[arg-type]  # only those that may be None are
        epsilon=1e-5,
        inner_norms=norms,
        initial_conv=t.get("initial_conv"),
        initial_state=t.get("initial_state"),
        segments=segments,
        discretization=discretization,
        keep_projected=keep_projected,
        keep_convolved=keep_convolved,
    )


@pytest.mark.parametrize("length", [1, 37])
@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("discretization", ["mamba", "zoh"])
def test_values_and_gradients_are_those_of_the_parts(
    values_and_gradients: Callable[..., Any], length: int, segmented: bool, norms: bool, discretization: str
) -> None:
    inputs = problem(length, states=segmented or norms, norms=norms, bias=not segmented, update=not norms)
    segments = torch.arange(length).div(5, rounding_mode="floor").expand(BATCH, -1).clone() if segmented else None
    if segments is not None:
        segments[1, : length // 3] = -1
    expected, expected_gradients = values_and_gradients(in_parts, inputs, segments, discretization)
    actual, gradients = values_and_gradients(at_once, inputs, segments, discretization)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("update", [False, True])
def test_kernels_are_as_close_to_float64_as_the_parts(
    values_and_gradients: Callable[..., Any], device: str, dtype: torch.dtype, update: bool
) -> None:
    """The stream and the weights are float32; with bfloat16 products and the update are made in it (autocast)."""
    exact = problem(70, states=True, norms=True, update=update)
    low = {"update", "initial_conv"}
    inputs = {name: value.to(device, dtype if name in low else torch.float32) for name, value in exact.items()}
    rounded = {name: value.double().cpu() for name, value in inputs.items()}
    expected, expected_gradients = values_and_gradients(in_parts, rounded, None, "mamba")
    with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
        actual, gradients = values_and_gradients(at_once, inputs, None, "mamba")
    with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
        by_parts, gradients_by_parts = values_and_gradients(partial(in_parts, backend="auto"), inputs, None, "mamba")
    assert [value.dtype for value in actual] == [torch.float32, dtype, dtype, torch.float32]
    assert {name: value.dtype for name, value in gradients.items()} == {n: value.dtype for n, value in inputs.items()}
    results = [*zip(actual, by_parts, expected, strict=True)]
    results += [(gradients[name], gradients_by_parts[name], expected_gradients[name]) for name in gradients]
    for value, by_part, exact in results:
        error, usual = ((x.detach().double().cpu() - exact).norm() / exact.norm() for x in (value, by_part))
        assert error <= 3e-5 if dtype == torch.float32 else error <= 1.5 * usual + 1e-3


@pytest.mark.parametrize("low", [False, True])
def test_in_proj_runs_again_where_its_output_is_not_kept(values_and_gradients: Callable[..., Any], low: bool) -> None:
    inputs = problem(9, states=True, norms=True, dtype=torch.float32 if low else torch.float64)
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        expected = values_and_gradients(at_once, inputs, None, "mamba")
        actual = values_and_gradients(partial(at_once, keep_projected=False), inputs, None, "mamba")
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    leaves = {name: value.requires_grad_() for name, value in inputs.items()}
    kept = list[int]()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t):
        at_once(None, "mamba", keep_projected=False, **leaves)
    assert BATCH * 9 * inputs["in_proj"].shape[0] not in kept


def test_the_conv_runs_once_where_its_output_is_kept(
    values_and_gradients: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = problem(9, states=True, norms=True)
    expected = values_and_gradients(at_once, inputs, None, "mamba")
    calls, conv = [], inner.Inner.conv
    monkeypatch.setattr(inner.Inner, "conv", lambda self: calls.append(1) or conv(self))
    actual = values_and_gradients(partial(at_once, keep_convolved=True), inputs, None, "mamba")
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert len(calls) == 1


def test_bfloat16_keeps_the_norm_by_its_output() -> None:
    """Neither the residual stream nor the embedding's output stays for the backward, and a weight of 0 learns."""
    inputs = problem(9, states=False, dtype=torch.float32)
    inputs["norm"][2] = 0
    leaves = {name: value.requires_grad_() for name, value in inputs.items()}
    kept = list[tuple[torch.dtype, tuple[int, ...]]]()
    hooks = (lambda x: kept.append((x.dtype, tuple(x.shape))) or x, lambda x: x)
    with torch.autograd.graph.saved_tensors_hooks(*hooks), torch.autocast("cpu", torch.bfloat16):
        output = at_once(None, "mamba", **leaves)[1]
    assert (torch.bfloat16, (BATCH, 9, SIZE)) in kept and (torch.float32, (BATCH, 9, SIZE)) not in kept
    upstream = torch.randn(output.shape)
    (found,) = torch.autograd.grad(output, [leaves["norm"]], upstream.to(output.dtype))
    wide = {name: value.detach().double().requires_grad_() for name, value in inputs.items()}
    (wanted,) = torch.autograd.grad(in_parts(None, "mamba", **wide)[1], [wide["norm"]], upstream.double())
    assert wanted[2].abs() > 0.1 and (found[2] - wanted[2]).abs() < 0.05 * wanted.abs().max()


def test_under_activation_checkpointing() -> None:
    """Where saved tensors are given out once only."""
    leaves = {name: value.requires_grad_() for name, value in problem(9, states=True).items()}

    def run(*values: Tensor) -> Tensor:
        return sum(output.sin().sum() for output in at_once(None, "mamba", **dict(zip(leaves, values, strict=True))))  # type: ignore[return-value]  # a tensor

    found = torch.autograd.grad(checkpoint(run, *leaves.values(), use_reentrant=False), list(leaves.values()))
    torch.testing.assert_close(found, torch.autograd.grad(run(*leaves.values()), list(leaves.values())))


def test_opcheck_and_compile() -> None:
    inputs = problem(9, states=True, norms=True, dtype=torch.float32)

    def run(**tensors: Tensor) -> Tensor:
        total, y, conv, state = at_once(None, "mamba", **tensors)
        return total.cos().sum() + y.sin().sum() + conv.sum() + state.sin().sum()

    leaves = {name: value.requires_grad_() for name, value in inputs.items()}
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(run(**leaves), list(leaves.values()))
    torch.testing.assert_close(torch.autograd.grad(compiled(**leaves), list(leaves.values())), expected)
    order = (
        "hidden update norm in_proj in_bias out_proj out_bias conv_weight conv_bias x_proj dt_norm B_norm C_norm"
        " dt_proj dt_bias A_log D initial_conv initial_state"
    )
    tensors = [leaves.get(name) for name in order.split()]
    options = (None, 1e-5, "mamba", 1e-5, torch.float32, 2)
    torch.library.opcheck(torch.ops.statespan.mamba1_block.default, (*tensors, *options))


def test_frozen_weights_and_unused_outputs() -> None:
    """What needs no gradient gets none, and outputs that no loss reads change nothing."""
    inputs = problem(9, states=False, dtype=torch.float32)
    leaves = {name: value.requires_grad_(name in ("update", "A_log")) for name, value in inputs.items()}
    for output in range(4):
        found = torch.autograd.grad(at_once(None, "mamba", **leaves)[output].sum(), [leaves["update"]])
        wanted = torch.autograd.grad(in_parts(None, "mamba", **leaves)[output].sum(), [leaves["update"]])
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_wrong_shapes_are_one_clear_line() -> None:
    inputs = problem(5, states=False)
    with pytest.raises(UserError, match=r"mamba1_block: x_proj must be \[r\+2n d\] = \[19, 24\], got \[18, 24\]"):
        at_once(None, "mamba", **inputs | {"x_proj": inputs["x_proj"][1:]})
    with pytest.raises(UserError, match=r"mamba1_block: out_proj must be \[h d\] = \[16, 24\], got \[15, 24\]"):
        at_once(None, "mamba", **inputs | {"out_proj": inputs["out_proj"][1:]})
