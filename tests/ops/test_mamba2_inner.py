"""mamba2_inner against the ops that it is made of, in float64 through their references: values and every gradient."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from statespan.errors import UserError
from statespan.ops import causal_conv1d, gated_rms_norm, mamba2_inner, ssd

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
BATCH, HEADS, HEAD_DIM, STATES, GROUPS, TAPS = 2, 4, 8, 16, 2, 4
SIZE, CONV = HEADS * HEAD_DIM, HEADS * HEAD_DIM + 2 * GROUPS * STATES
NAMES = "zxBCdt conv_weight conv_bias dt_bias A_log D norm initial_conv initial_state"
OPTIONS = {"num_groups": GROUPS, "norm_size": SIZE // 2, "dt_limit": (0.01, 2.0), "chunk_size": 16}


def problem(length: int, *, states: bool, norm: bool, bias: bool = True) -> dict[str, Tensor]:
    """Random float64 inputs by name."""
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    found = {
        "zxBCdt": normal(BATCH, length, SIZE + CONV + HEADS),
        "conv_weight": normal(CONV, TAPS) / 2,
        "dt_bias": normal(HEADS) - 1,
        "A_log": normal(HEADS),
        "D": normal(HEADS),
    }
    if bias:
        found["conv_bias"] = normal(CONV)
    if norm:
        found["norm"] = normal(SIZE)
    if states:
        found["initial_conv"] = normal(BATCH, TAPS - 1, CONV)
        found["initial_state"] = normal(BATCH, HEADS, HEAD_DIM, STATES)
    return {name: found[name] for name in NAMES.split() if name in found}


def in_parts(segments: Tensor | None, before: bool, **t: Tensor) -> tuple[Tensor, ...]:
    """The equations, op by op, by the references."""
    z, xBC, dt = t["zxBCdt"].split([SIZE, CONV, HEADS], dim=-1)
    mixed, conv = causal_conv1d(
        xBC,
        t["conv_weight"],
        t.get("conv_bias"),
        initial_state=t.get("initial_conv"),
        segments=segments,
        return_final_state=True,
        backend="reference",
    )
    x, B, C = mixed.split([SIZE, GROUPS * STATES, GROUPS * STATES], dim=-1)
    y, state = ssd(
        x.unflatten(-1, (HEADS, HEAD_DIM)),
        dt,
        -t["A_log"].exp(),
        B.unflatten(-1, (GROUPS, STATES)),
        C.unflatten(-1, (GROUPS, STATES)),
        t["D"],
        dt_bias=t["dt_bias"],
        dt_limit=OPTIONS["dt_limit"],
        initial_state=t.get("initial_state"),
        segments=segments,
        return_final_state=True,
        backend="reference",
    )
    y = y.flatten(-2)
    if "norm" not in t:
        return y * F.silu(z), conv, state
    options = {"eps": 1e-5, "group_size": OPTIONS["norm_size"], "norm_before_gate": before, "backend": "reference"}
    return gated_rms_norm(y, z, t["norm"], **options), conv, state


def at_once(segments: Tensor | None, before: bool, **t: Tensor) -> tuple[Tensor, ...]:
    names = NAMES.split()[:7]
    return mamba2_inner(
        *(t.get(name) for name in names),  # type: ignore[arg-type]  # only those that may be None are
        norm_before_gate=before,
        initial_conv=t.get("initial_conv"),
        initial_state=t.get("initial_state"),
        segments=segments,
        **OPTIONS,
    )


@pytest.mark.parametrize("length", [1, 37])
@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize(("norm", "before"), [(False, False), (True, False), (True, True)])
def test_values_and_gradients_are_those_of_the_parts(
    values_and_gradients: Callable[..., Any], length: int, segmented: bool, norm: bool, before: bool
) -> None:
    inputs = problem(length, states=segmented, norm=norm, bias=not segmented)
    segments = torch.arange(length).div(5, rounding_mode="floor").expand(BATCH, -1).clone() if segmented else None
    if segments is not None:
        segments[1, : length // 3] = -1
    expected, expected_gradients = values_and_gradients(in_parts, inputs, segments, before)
    actual, gradients = values_and_gradients(at_once, inputs, segments, before)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_are_close_to_float64(
    values_and_gradients: Callable[..., Any], device: str, dtype: torch.dtype
) -> None:
    low = {"zxBCdt", "conv_weight", "conv_bias", "initial_conv"}
    inputs = {
        name: value.to(device, dtype if name in low else torch.float32)
        for name, value in problem(70, states=True, norm=True).items()
    }
    rounded = {name: value.double().cpu() for name, value in inputs.items()}
    expected, expected_gradients = values_and_gradients(in_parts, rounded, None, False)
    actual, gradients = values_and_gradients(at_once, inputs, None, False)
    tolerance = 3e-5 if dtype == torch.float32 else 3e-2
    for value, wanted in zip(actual, expected, strict=True):
        assert (value.double().cpu() - wanted).norm() <= tolerance * wanted.norm()
    for name, value in gradients.items():
        assert value.dtype == inputs[name].dtype
        wanted = expected_gradients[name]
        assert (value.double().cpu() - wanted).norm() <= tolerance * wanted.norm(), name


def test_opcheck_and_compile() -> None:
    leaves = {n: v.float().requires_grad_() for n, v in problem(9, states=True, norm=True).items()}

    def run(**tensors: Tensor) -> Tensor:
        y, conv, state = at_once(None, False, **tensors)
        return y.sin().sum() + conv.sum() + state.sin().sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(run(**leaves), list(leaves.values()))
    torch.testing.assert_close(torch.autograd.grad(compiled(**leaves), list(leaves.values())), expected)
    options = (GROUPS, 1e-5, SIZE // 2, False, 0.01, 2.0, 16, "mamba", True)
    torch.library.opcheck(torch.ops.statespan.mamba2_inner.default, (*leaves.values(), None, *options))


def test_wrong_shapes_are_one_clear_line() -> None:
    inputs = problem(5, states=False, norm=True)
    with pytest.raises(UserError, match="must be a multiple of the heads"):
        at_once(None, False, **inputs | {"zxBCdt": inputs["zxBCdt"][..., 1:]})
    with pytest.raises(UserError, match=r"mamba2_inner: norm must be \[d\] = \[32\], got \[31\]"):
        at_once(None, False, **inputs | {"norm": inputs["norm"][1:]})
