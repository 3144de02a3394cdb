"""mamba2_block against the ops that it is made of, in float64 through their references: values and every gradient."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from statespan.errors import UserError
from statespan.ops import causal_conv1d, gated_rms_norm, mamba2_block, rms_norm, ssd
from statespan.ops.mamba2_block import inner

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
BATCH, HEADS, HEAD_DIM, STATES, GROUPS, TAPS = 2, 4, 8, 16, 2, 4
SIZE, CONV = HEADS * HEAD_DIM, HEADS * HEAD_DIM + 2 * GROUPS * STATES
WIDTH = 16  # of the residual stream
NAMES = (
    "hidden update norm in_proj in_bias conv_weight conv_bias dt_bias A_log D gate_norm out_proj out_bias initial_conv"
    " initial_state"
)
OPTIONS = {"num_groups": GROUPS, "norm_size": SIZE // 2, "dt_limit": (0.01, 2.0), "chunk_size": 16}


def problem(length: int, *, states: bool, norm: bool, bias: bool = True, update: bool = True) -> dict[str, Tensor]:
    """Random float64 inputs by name."""
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    found = {
        "hidden": normal(BATCH, length, WIDTH),
        "norm": normal(WIDTH),
        "in_proj": normal(SIZE + CONV + HEADS, WIDTH) / WIDTH**0.5,
        "out_proj": normal(WIDTH, SIZE) / SIZE**0.5,
        "conv_weight": normal(CONV, TAPS) / 2,
        "dt_bias": normal(HEADS) - 1,
        "A_log": normal(HEADS),
        "D": normal(HEADS),
    }
    if bias:
        found |= {"conv_bias": normal(CONV), "in_bias": normal(SIZE + CONV + HEADS), "out_bias": normal(WIDTH)}
    if norm:
        found["gate_norm"] = normal(SIZE)
    if update:
        found["update"] = normal(BATCH, length, WIDTH)
    if states:
        found["initial_conv"] = normal(BATCH, TAPS - 1, CONV)
        found["initial_state"] = normal(BATCH, HEADS, HEAD_DIM, STATES)
    return {name: found[name] for name in NAMES.split() if name in found}


def in_parts(segments: Tensor | None, before: bool, backend: str = "reference", **t: Tensor) -> tuple[Tensor, ...]:
    """The equations, op by op, by the references."""
    total = t["hidden"]
    if "update" in t:
        normed, total = rms_norm(t["update"], t["norm"], eps=1e-5, residual=total, backend=backend)
    else:
        normed = rms_norm(total, t["norm"], eps=1e-5, backend=backend)
    z, xBC, dt = F.linear(normed, t["in_proj"], t.get("in_bias")).split([SIZE, CONV, HEADS], dim=-1)
    mixed, conv = causal_conv1d(
        xBC,
        t["conv_weight"],
        t.get("conv_bias"),
        initial_state=t.get("initial_conv"),
        segments=segments,
        return_final_state=True,
        backend=backend,
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
        backend=backend,
    )
    y = y.flatten(-2)
    if "gate_norm" in t:
        options = {"eps": 1e-5, "group_size": OPTIONS["norm_size"], "norm_before_gate": before, "backend": backend}
        y = gated_rms_norm(y, z, t["gate_norm"], **options)
    else:
        y = y * F.silu(z)
    return total, F.linear(y, t["out_proj"], t.get("out_bias")), conv, state


def at_once(
    segments: Tensor | None, before: bool, keep_projected: bool = True, keep_convolved: bool = False, **t: Tensor
) -> tuple[Tensor, ...]:
    names = NAMES.split()[:-2]
    return mamba2_block(
        *(t.get(name) for name in names),  # type: ignore[arg-type]  # only those that may be None are
        epsilon=1e-5,
        norm_before_gate=before,
        initial_conv=t.get("initial_conv"),
        initial_state=t.get("initial_state"),
        segments=segments,
        keep_projected=keep_projected,
        keep_convolved=keep_convolved,
        **OPTIONS,
    )


@pytest.mark.parametrize("length", [1, 37])
@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize(("norm", "before"), [(False, False), (True, False), (True, True)])
def test_values_and_gradients_are_those_of_the_parts(
    values_and_gradients: Callable[..., Any], length: int, segmented: bool, norm: bool, before: bool
) -> None:
    inputs = problem(length, states=segmented, norm=norm, bias=not segmented, update=not before)
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
    """The stream and the weights are float32; with bfloat16 products and the update are made in it (autocast)."""
    low = {"update", "initial_conv"}
    inputs = {
        name: value.to(device, dtype if name in low else torch.float32)
        for name, value in problem(70, states=True, norm=True).items()
    }
    rounded = {name: value.double().cpu() for name, value in inputs.items()}
    expected, expected_gradients = values_and_gradients(in_parts, rounded, None, False)
    with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
        actual, gradients = values_and_gradients(at_once, inputs, None, False)
    with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
        by_parts, gradients_by_parts = values_and_gradients(partial(in_parts, backend="auto"), inputs, None, False)
    assert [value.dtype for value in actual] == [torch.float32, dtype, dtype, torch.float32]
    assert {name: value.dtype for name, value in gradients.items()} == {n: value.dtype for n, value in inputs.items()}
    results = [*zip(actual, by_parts, expected, strict=True)]
    results += [(gradients[name], gradients_by_parts[name], expected_gradients[name]) for name in gradients]
    for value, by_part, exact in results:
        error, usual = ((x.detach().double().cpu() - exact).norm() / exact.norm() for x in (value, by_part))
        assert error <= 3e-5 if dtype == torch.float32 else error <= 1.5 * usual + 1e-3


def test_in_proj_runs_again_where_its_output_is_not_kept(values_and_gradients: Callable[..., Any]) -> None:
    inputs = problem(9, states=True, norm=True)
    expected = values_and_gradients(at_once, inputs, None, False)
    actual = values_and_gradients(partial(at_once, keep_projected=False), inputs, None, False)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    leaves = {name: value.requires_grad_() for name, value in inputs.items()}
    kept = list[int]()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t):
        at_once(None, False, keep_projected=False, **leaves)
    assert BATCH * 9 * inputs["in_proj"].shape[0] not in kept


def test_the_conv_runs_once_where_its_output_is_kept(
    values_and_gradients: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = problem(9, states=True, norm=True)
    expected = values_and_gradients(at_once, inputs, None, False)
    calls, conv = [], inner.Inner.conv
    monkeypatch.setattr(inner.Inner, "conv", lambda self, xBC: calls.append(1) or conv(self, xBC))
    actual = values_and_gradients(partial(at_once, keep_convolved=True), inputs, None, False)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert len(calls) == 1


def test_opcheck_and_compile() -> None:
    leaves = {n: v.float().requires_grad_() for n, v in problem(9, states=True, norm=True).items()}

    def run(**tensors: Tensor) -> Tensor:
        total, y, conv, state = at_once(None, False, **tensors)
        return total.cos().sum() + y.sin().sum() + conv.sum() + state.sin().sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(run(**leaves), list(leaves.values()))
    torch.testing.assert_close(torch.autograd.grad(compiled(**leaves), list(leaves.values())), expected)
    order = (
        "hidden update norm in_proj in_bias out_proj out_bias conv_weight conv_bias dt_bias A_log D gate_norm"
        " initial_conv initial_state"
    )
    options = (GROUPS, 1e-5, SIZE // 2, False, 0.01, 2.0, 16, "mamba", 1e-5, torch.float32, 2)
    tensors = [leaves[name] for name in order.split()]
    torch.library.opcheck(torch.ops.statespan.mamba2_block.default, (*tensors, None, *options))


def test_wrong_shapes_are_one_clear_line() -> None:
    inputs = problem(5, states=False, norm=True)
    with pytest.raises(UserError, match="must be a multiple of the heads"):
        at_once(None, False, **inputs | {"in_proj": inputs["in_proj"][1:]})
    with pytest.raises(UserError, match=r"mamba2_block: gate_norm must be \[d\] = \[32\], got \[31\]"):
        at_once(None, False, **inputs | {"gate_norm": inputs["gate_norm"][1:]})
    with pytest.raises(UserError, match=r"mamba2_block: out_proj must be \[h d\] = \[16, 32\], got \[16, 31\]"):
        at_once(None, False, **inputs | {"out_proj": inputs["out_proj"][:, 1:]})
