"""mamba1_inner against the ops that it is made of, in float64 through their references: values and every gradient."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from statespan.errors import UserError
from statespan.ops import causal_conv1d, mamba1_inner, rms_norm, selective_scan

BATCH, CHANNELS, STATES, RANK, TAPS = 2, 24, 8, 3, 4
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
NAMES = "xz conv_weight conv_bias x_proj dt_proj dt_bias A_log D dt_norm B_norm C_norm initial_conv initial_state"


def problem(length: int, *, states: bool, dtype: torch.dtype = torch.float64, **kinds: bool) -> dict[str, Tensor]:
    """Random inputs by name; `norms` and `bias` say which optional ones are there."""
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    found = {
        "xz": normal(BATCH, length, 2 * CHANNELS),
        "conv_weight": normal(CHANNELS, TAPS) / 2,
        "x_proj": normal(RANK + 2 * STATES, CHANNELS) / CHANNELS**0.5,
        "dt_proj": normal(CHANNELS, RANK) / RANK**0.5,
        "dt_bias": normal(CHANNELS) - 2,
        "A_log": normal(CHANNELS, STATES),
        "D": normal(CHANNELS),
    }
    if kinds.get("bias", True):
        found["conv_bias"] = normal(CHANNELS)
    if kinds.get("norms"):
        found |= {"dt_norm": normal(RANK), "B_norm": normal(STATES), "C_norm": normal(STATES)}
    if states:
        found |= {"initial_conv": normal(BATCH, TAPS - 1, CHANNELS), "initial_state": normal(BATCH, CHANNELS, STATES)}
    return {name: found[name].to(dtype) for name in NAMES.split() if name in found}


def in_parts(segments: Tensor | None, discretization: str, **t: Tensor) -> tuple[Tensor, ...]:
    """The equations, op by op, by the references."""
    x, z = t["xz"].chunk(2, dim=-1)
    u, conv = causal_conv1d(
        x,
        t["conv_weight"],
        t.get("conv_bias"),
        initial_state=t.get("initial_conv"),
        segments=segments,
        return_final_state=True,
        backend="reference",
    )
    dt, B, C = F.linear(u, t["x_proj"]).split([RANK, STATES, STATES], dim=-1)
    if "dt_norm" in t:
        pairs = ((dt, t["dt_norm"]), (B, t["B_norm"]), (C, t["C_norm"]))
        dt, B, C = (rms_norm(part, weight, eps=1e-5, backend="reference") for part, weight in pairs)
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
        backend="reference",
    )
    return y, conv, state


def at_once(segments: Tensor | None, discretization: str, **t: Tensor) -> tuple[Tensor, ...]:
    norms = (t["dt_norm"], t["B_norm"], t["C_norm"]) if "dt_norm" in t else None
    names = ("xz", "conv_weight", "conv_bias", "x_proj", "dt_proj", "dt_bias", "A_log", "D")
    return mamba1_inner(
        *(t.get(name) for name in names),  # type: ignore[arg-type]  # conv_bias alone may be None
        inner_norms=norms,
        initial_conv=t.get("initial_conv"),
        initial_state=t.get("initial_state"),
        segments=segments,
        discretization=discretization,
    )


@pytest.mark.parametrize("length", [1, 37])
@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("discretization", ["mamba", "zoh"])
def test_values_and_gradients_are_those_of_the_parts(
    values_and_gradients: Callable[..., Any], length: int, segmented: bool, norms: bool, discretization: str
) -> None:
    inputs = problem(length, states=segmented or norms, norms=norms, bias=not segmented)
    segments = torch.arange(length).div(5, rounding_mode="floor").expand(BATCH, -1).clone() if segmented else None
    if segments is not None:
        segments[1, : length // 3] = -1
    expected, expected_gradients = values_and_gradients(in_parts, inputs, segments, discretization)
    actual, gradients = values_and_gradients(at_once, inputs, segments, discretization)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_are_as_close_to_float64_as_the_parts(
    values_and_gradients: Callable[..., Any], device: str, dtype: torch.dtype
) -> None:
    exact = problem(70, states=True, norms=True)
    low = {"xz", "conv_weight", "conv_bias", "x_proj", "dt_proj", "initial_conv"}
    inputs = {name: value.to(device, dtype if name in low else torch.float32) for name, value in exact.items()}
    rounded = {name: value.double().cpu() for name, value in inputs.items()}
    expected, expected_gradients = values_and_gradients(in_parts, rounded, None, "mamba")
    actual, gradients = values_and_gradients(at_once, inputs, None, "mamba")
    tolerance = 3e-5 if dtype == torch.float32 else 3e-2
    for name, value in dict(zip(("y", "conv", "state"), actual, strict=True)).items():
        wanted = expected[("y", "conv", "state").index(name)]
        assert (value.double().cpu() - wanted).norm() <= tolerance * wanted.norm(), name
    for name, value in gradients.items():
        assert value.dtype == inputs[name].dtype
        wanted = expected_gradients[name]
        assert (value.double().cpu() - wanted).norm() <= tolerance * wanted.norm(), name


def test_opcheck_and_compile() -> None:
    inputs = problem(9, states=True, norms=True, dtype=torch.float32)

    def run(**tensors: Tensor) -> Tensor:
        y, conv, state = at_once(None, "mamba", **tensors)
        return y.sin().sum() + conv.sum() + state.sin().sum()

    leaves = {name: value.requires_grad_() for name, value in inputs.items()}
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(run(**leaves), list(leaves.values()))
    torch.testing.assert_close(torch.autograd.grad(compiled(**leaves), list(leaves.values())), expected)
    order = "xz conv_weight conv_bias x_proj dt_norm B_norm C_norm dt_proj dt_bias A_log D initial_conv initial_state"
    tensors = [leaves.get(name) for name in order.split()]
    torch.library.opcheck(torch.ops.statespan.mamba1_inner.default, (*tensors, None, 1e-5, "mamba", True))


def test_wrong_shapes_and_dtypes_are_one_clear_line() -> None:
    inputs = problem(5, states=False)
    with pytest.raises(UserError, match=r"mamba1_inner: x_proj must be \[r\+2n d\] = \[19, 24\], got \[18, 24\]"):
        at_once(None, "mamba", **inputs | {"x_proj": inputs["x_proj"][1:]})
    with pytest.raises(UserError, match="they must agree"):
        at_once(None, "mamba", **inputs | {"x_proj": inputs["x_proj"].float()})
