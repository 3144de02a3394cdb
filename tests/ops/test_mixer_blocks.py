"""mamba1_block and mamba2_block against the ops they are made of, in float64 by their references: values, gradients."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from statespan.errors import UserError
from statespan.ops import (
    causal_conv1d,
    gated_rms_norm,
    mamba1_block,
    mamba2_block,
    mixer_block,
    rms_norm,
    selective_scan,
    ssd,
)
from statespan.ops.mamba1_block.inner import Inner as Inner1
from statespan.ops.mamba2_block.inner import Inner as Inner2

BATCH, WIDTH, TAPS = 2, 16, 4
MAMBA2: dict[str, Any] = {"num_groups": 2, "norm_size": 16, "dt_limit": (0.01, 2.0), "chunk_size": 16}
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def drawn(length: int) -> Callable[..., Tensor]:
    """Random float64 tensors of given shapes, the same for a length."""
    generator = torch.Generator().manual_seed(length)
    return lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)


def enter(t: dict[str, Tensor], backend: str) -> tuple[Tensor, Tensor]:
    """hidden + update, and in_proj of its norm."""
    if "update" in t:
        normed, total = rms_norm(t["update"], t["norm"], eps=1e-5, residual=t["hidden"], backend=backend)
    else:
        normed, total = rms_norm(t["hidden"], t["norm"], eps=1e-5, backend=backend), t["hidden"]
    return total, F.linear(normed, t["in_proj"], t.get("in_bias"))


def convolve(x: Tensor, t: dict[str, Tensor], segments: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    """With the state after it."""
    initial, bias = t.get("initial_conv"), t.get("conv_bias")
    options: dict[str, Any] = {"segments": segments, "return_final_state": True, "backend": backend}
    return causal_conv1d(x, t["conv_weight"], bias, initial_state=initial, **options)


class Mamba1:
    """`option` is the discretization."""

    channels, states, rank = 24, 8, 3
    option: Any = "mamba"
    inner: type = Inner1
    close = ({"rtol": 1e-11, "atol": 1e-11}, {"rtol": 1e-9, "atol": 1e-10})  # of values, of gradients

    @classmethod
    def problem(
        cls, length: int, *, states: bool = True, norms: bool = True, bias: bool = True, update: bool = True
    ) -> dict[str, Tensor]:
        """Random float64 inputs by name."""
        normal, channels, rank = drawn(length), cls.channels, cls.rank
        found = {
            "hidden": normal(BATCH, length, WIDTH),
            "norm": normal(WIDTH),
            "in_proj": normal(2 * channels, WIDTH) / WIDTH**0.5,
            "out_proj": normal(WIDTH, channels) / channels**0.5,
            "conv_weight": normal(channels, TAPS) / 2,
            "x_proj": normal(rank + 2 * cls.states, channels) / channels**0.5,
            "dt_proj": normal(channels, rank) / rank**0.5,
            "dt_bias": normal(channels) - 2,
            "A_log": normal(channels, cls.states),
            "D": normal(channels),
        }
        if bias:
            found |= {"conv_bias": normal(channels), "in_bias": normal(2 * channels), "out_bias": normal(WIDTH)}
        if update:
            found["update"] = normal(BATCH, length, WIDTH)
        if norms:
            found |= {"dt_norm": normal(rank), "B_norm": normal(cls.states), "C_norm": normal(cls.states)}
        if states:
            found["initial_conv"] = normal(BATCH, TAPS - 1, channels)
            found["initial_state"] = normal(BATCH, channels, cls.states)
        return found

    @classmethod
    def in_parts(
        cls, segments: Tensor | None, option: Any, backend: str = "reference", **t: Tensor
    ) -> tuple[Tensor, ...]:
        """The equations, op by op."""
        total, projected = enter(t, backend)
        x, z = projected.chunk(2, dim=-1)
        u, conv = convolve(x, t, segments, backend)
        dt, B, C = F.linear(u, t["x_proj"]).split([cls.rank, cls.states, cls.states], dim=-1)
        if "dt_norm" in t:
            pairs = ((dt, t["dt_norm"]), (B, t["B_norm"]), (C, t["C_norm"]))
            dt, B, C = (rms_norm(part, weight, eps=1e-5, backend=backend) for part, weight in pairs)
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
            discretization=option,
            backend=backend,
        )
        return total, F.linear(y, t["out_proj"], t.get("out_bias")), conv, state

    @classmethod
    def at_once(cls, segments: Tensor | None, option: Any, **inputs: Any) -> tuple[Tensor, ...]:
        """The op; `inputs` may hold keep_projected and keep_convolved."""
        t = {"update": None, "in_bias": None, "conv_bias": None, "out_bias": None} | inputs
        norms = [t.pop(name, None) for name in ("dt_norm", "B_norm", "C_norm")]
        inner_norms = None if norms[0] is None else tuple(norms)
        return mamba1_block(**t, epsilon=1e-5, inner_norms=inner_norms, segments=segments, discretization=option)

    @classmethod
    def opcheck(cls, leaves: dict[str, Tensor]) -> None:
        """As torch.library wants it, with all inputs but segments."""
        order = (
            "hidden update norm in_proj in_bias out_proj out_bias conv_weight conv_bias x_proj dt_norm B_norm C_norm"
            " dt_proj dt_bias A_log D initial_conv initial_state"
        )
        tensors = [leaves[name] for name in order.split()]
        options = (None, 1e-5, "mamba", 1e-5, torch.float32, 2, False)
        torch.library.opcheck(torch.ops.statespan.mamba1_block.default, (*tensors, *options))


class Mamba2:
    """`option` is whether the norm comes before the gate; with `norms` there is one."""

    heads, head_dim, states, groups = 4, 8, 16, 2
    channels = heads * head_dim
    conv_channels = channels + 2 * groups * states
    option: Any = False
    inner: type = Inner2
    close = ({"rtol": 1e-10, "atol": 1e-10}, {"rtol": 1e-8, "atol": 1e-9})

    @classmethod
    def problem(
        cls, length: int, *, states: bool = True, norms: bool = True, bias: bool = True, update: bool = True
    ) -> dict[str, Tensor]:
        """Random float64 inputs by name."""
        normal, rows = drawn(length), cls.channels + cls.conv_channels + cls.heads
        found = {
            "hidden": normal(BATCH, length, WIDTH),
            "norm": normal(WIDTH),
            "in_proj": normal(rows, WIDTH) / WIDTH**0.5,
            "out_proj": normal(WIDTH, cls.channels) / cls.channels**0.5,
            "conv_weight": normal(cls.conv_channels, TAPS) / 2,
            "dt_bias": normal(cls.heads) - 1,
            "A_log": normal(cls.heads),
            "D": normal(cls.heads),
        }
        if bias:
            found |= {"conv_bias": normal(cls.conv_channels), "in_bias": normal(rows), "out_bias": normal(WIDTH)}
        if norms:
            found["gate_norm"] = normal(cls.channels)
        if update:
            found["update"] = normal(BATCH, length, WIDTH)
        if states:
            found["initial_conv"] = normal(BATCH, TAPS - 1, cls.conv_channels)
            found["initial_state"] = normal(BATCH, cls.heads, cls.head_dim, cls.states)
        return found

    @classmethod
    def in_parts(
        cls, segments: Tensor | None, option: Any, backend: str = "reference", **t: Tensor
    ) -> tuple[Tensor, ...]:
        """The equations, op by op."""
        total, projected = enter(t, backend)
        z, xBC, dt = projected.split([cls.channels, cls.conv_channels, cls.heads], dim=-1)
        mixed, conv = convolve(xBC, t, segments, backend)
        x, B, C = mixed.split([cls.channels, cls.groups * cls.states, cls.groups * cls.states], dim=-1)
        y, state = ssd(
            x.unflatten(-1, (cls.heads, cls.head_dim)),
            dt,
            -t["A_log"].exp(),
            B.unflatten(-1, (cls.groups, cls.states)),
            C.unflatten(-1, (cls.groups, cls.states)),
            t["D"],
            dt_bias=t["dt_bias"],
            dt_limit=MAMBA2["dt_limit"],
            initial_state=t.get("initial_state"),
            segments=segments,
            return_final_state=True,
            backend=backend,
        )
        y = y.flatten(-2)
        if "gate_norm" in t:
            norm: dict[str, Any] = {"group_size": MAMBA2["norm_size"], "norm_before_gate": option, "backend": backend}
            y = gated_rms_norm(y, z, t["gate_norm"], eps=1e-5, **norm)
        else:
            y = y * F.silu(z)
        return total, F.linear(y, t["out_proj"], t.get("out_bias")), conv, state

    @classmethod
    def at_once(cls, segments: Tensor | None, option: Any, **inputs: Any) -> tuple[Tensor, ...]:
        """The op; `inputs` may hold keep_projected and keep_convolved."""
        t = {"update": None, "in_bias": None, "conv_bias": None, "gate_norm": None, "out_bias": None} | inputs
        return mamba2_block(**t, epsilon=1e-5, norm_before_gate=option, segments=segments, **MAMBA2)

    @classmethod
    def opcheck(cls, leaves: dict[str, Tensor]) -> None:
        """As torch.library wants it, with all inputs but segments."""
        order = (
            "hidden update norm in_proj in_bias out_proj out_bias conv_weight conv_bias dt_bias A_log D gate_norm"
            " initial_conv initial_state"
        )
        tensors = [leaves[name] for name in order.split()]
        options = (cls.groups, 1e-5, cls.channels // 2, False, 0.01, 2.0, 16, "mamba", 1e-5, torch.float32, 2, False)
        torch.library.opcheck(torch.ops.statespan.mamba2_block.default, (*tensors, None, *options))


Block = type[Mamba1] | type[Mamba2]
both_blocks = pytest.mark.parametrize("block", [Mamba1, Mamba2], ids=["mamba1", "mamba2"])


def values_and_gradients(
    function: Callable[..., tuple[Tensor, ...]], inputs: dict[str, Tensor], segments: Tensor | None, option: Any
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Outputs, and every input's gradient by name, of a sum with random weights, the same in every call."""
    leaves = {name: value.clone().requires_grad_() for name, value in inputs.items()}
    outputs = function(segments, option, **leaves)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.device) for o in outputs]
    total = sum((o.double() * w).sum() for o, w in zip(outputs, weights, strict=True))
    found = torch.autograd.grad(total, list(leaves.values()))  # type: ignore[arg-type]  # a tensor
    return outputs, dict(zip(leaves, found, strict=True))


@pytest.mark.parametrize("length", [1, 37])
@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize(
    ("block", "norms", "option", "update"),
    [
        (Mamba1, False, "mamba", True),
        (Mamba1, False, "zoh", True),
        (Mamba1, True, "mamba", False),
        (Mamba1, True, "zoh", False),
        (Mamba2, False, False, True),
        (Mamba2, True, False, True),
        (Mamba2, True, True, False),
    ],
)
def test_values_and_gradients_are_those_of_the_parts(
    block: Block, norms: bool, option: Any, update: bool, length: int, segmented: bool
) -> None:
    inputs = block.problem(length, states=segmented or norms, norms=norms, bias=not segmented, update=update)
    segments = torch.arange(length).div(5, rounding_mode="floor").expand(BATCH, -1).clone() if segmented else None
    if segments is not None:
        segments[1, : length // 3] = -1
    expected, expected_gradients = values_and_gradients(block.in_parts, inputs, segments, option)
    actual, gradients = values_and_gradients(block.at_once, inputs, segments, option)
    torch.testing.assert_close(actual, expected, **block.close[0])
    torch.testing.assert_close(gradients, expected_gradients, **block.close[1])


@both_blocks
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("update", [False, True])
def test_kernels_are_as_close_to_float64_as_the_parts(
    block: Block, device: str, dtype: torch.dtype, update: bool
) -> None:
    """The stream and the weights are float32; with bfloat16 products and the update are made in it (autocast)."""
    low = {"update", "initial_conv"}
    exact = block.problem(70, update=update)
    inputs = {name: value.to(device, dtype if name in low else torch.float32) for name, value in exact.items()}
    rounded = {name: value.double().cpu() for name, value in inputs.items()}
    expected, expected_gradients = values_and_gradients(block.in_parts, rounded, None, block.option)
    with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
        actual, gradients = values_and_gradients(block.at_once, inputs, None, block.option)
    with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
        parts = partial(block.in_parts, backend="auto")
        by_parts, gradients_by_parts = values_and_gradients(parts, inputs, None, block.option)
    assert [value.dtype for value in actual] == [torch.float32, dtype, dtype, torch.float32]
    assert {name: value.dtype for name, value in gradients.items()} == {n: value.dtype for n, value in inputs.items()}
    results = [*zip(actual, by_parts, expected, strict=True)]
    results += [(gradients[name], gradients_by_parts[name], expected_gradients[name]) for name in gradients]
    for value, by_part, exact_value in results:
        error, usual = ((x.detach().double().cpu() - exact_value).norm() / exact_value.norm() for x in (value, by_part))
        assert error <= 3e-5 if dtype == torch.float32 else error <= 1.5 * usual + 1e-3


@both_blocks
@pytest.mark.parametrize("low", [False, True])
def test_in_proj_runs_again_where_its_output_is_not_kept(block: Block, low: bool) -> None:
    inputs = {name: value.float() if low else value for name, value in block.problem(9).items()}
    again = partial(block.at_once, keep_projected=False)
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        expected = values_and_gradients(block.at_once, inputs, None, block.option)
        actual = values_and_gradients(again, inputs, None, block.option)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    leaves = {name: value.requires_grad_() for name, value in inputs.items()}
    kept = list[int]()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t):
        again(None, block.option, **leaves)
    assert BATCH * 9 * inputs["in_proj"].shape[0] not in kept


@both_blocks
def test_the_conv_runs_once_where_its_output_is_kept(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = block.problem(9)
    expected = values_and_gradients(block.at_once, inputs, None, block.option)
    calls, conv = list[int](), block.inner.conv
    monkeypatch.setattr(block.inner, "conv", lambda *arguments: calls.append(1) or conv(*arguments))
    actual = values_and_gradients(partial(block.at_once, keep_convolved=True), inputs, None, block.option)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert len(calls) == 1


@both_blocks
def test_weights_are_cast_once_where_they_are_kept(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = {name: value.float() for name, value in block.problem(9).items()}
    inputs["out_proj"] = inputs["out_proj"].bfloat16()  # is not cast
    calls, cast = list[int](), mixer_block.in_dtype
    monkeypatch.setattr(mixer_block, "in_dtype", lambda *arguments: calls.append(1) or cast(*arguments))
    with torch.autocast("cpu", torch.bfloat16):
        expected = values_and_gradients(block.at_once, inputs, None, block.option)
        actual = values_and_gradients(partial(block.at_once, keep_cast=True), inputs, None, block.option)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert len(calls) == 3


@both_blocks
def test_bfloat16_keeps_the_norm_by_its_output(block: Block) -> None:
    """Neither the residual stream nor the embedding's output stays for the backward, and a weight of 0 learns."""
    inputs = {name: value.float() for name, value in block.problem(9, states=False, norms=False).items()}
    inputs["norm"][2] = 0
    leaves = {name: value.requires_grad_() for name, value in inputs.items()}
    kept = list[tuple[torch.dtype, tuple[int, ...]]]()
    hooks = (lambda x: kept.append((x.dtype, tuple(x.shape))) or x, lambda x: x)
    with torch.autograd.graph.saved_tensors_hooks(*hooks), torch.autocast("cpu", torch.bfloat16):
        output = block.at_once(None, block.option, **leaves)[1]
    assert (torch.bfloat16, (BATCH, 9, WIDTH)) in kept and (torch.float32, (BATCH, 9, WIDTH)) not in kept
    upstream = torch.randn(output.shape)
    (found,) = torch.autograd.grad(output, [leaves["norm"]], upstream.to(output.dtype))
    wide = {name: value.detach().double().requires_grad_() for name, value in inputs.items()}
    (wanted,) = torch.autograd.grad(block.in_parts(None, block.option, **wide)[1], [wide["norm"]], upstream.double())
    assert wanted[2].abs() > 0.1 and (found[2] - wanted[2]).abs() < 0.05 * wanted.abs().max()


@both_blocks
def test_under_activation_checkpointing(block: Block) -> None:
    """Where saved tensors are given out once only."""
    leaves = {name: value.requires_grad_() for name, value in block.problem(9).items()}

    def run(*values: Tensor) -> Tensor:
        outputs = block.at_once(None, block.option, **dict(zip(leaves, values, strict=True)))
        return sum(output.sin().sum() for output in outputs)  # type: ignore[return-value]  # a tensor

    found = torch.autograd.grad(checkpoint(run, *leaves.values(), use_reentrant=False), list(leaves.values()))
    torch.testing.assert_close(found, torch.autograd.grad(run(*leaves.values()), list(leaves.values())))


@both_blocks
def test_opcheck_and_compile(block: Block) -> None:
    leaves = {name: value.float().requires_grad_() for name, value in block.problem(9).items()}

    def run(**tensors: Tensor) -> Tensor:
        total, y, conv, state = block.at_once(None, block.option, **tensors)
        return total.cos().sum() + y.sin().sum() + conv.sum() + state.sin().sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(run(**leaves), list(leaves.values()))
    torch.testing.assert_close(torch.autograd.grad(compiled(**leaves), list(leaves.values())), expected)
    block.opcheck(leaves)


@both_blocks
def test_compiled_with_weights_that_are_kept_cast(block: Block) -> None:
    """Of them one has the products' dtype, and is its own cast."""
    inputs = {name: value.float() for name, value in block.problem(9).items()}
    inputs["out_proj"] = inputs["out_proj"].bfloat16()
    at_once = partial(block.at_once, keep_cast=True)
    compiled = torch.compile(at_once, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        expected = values_and_gradients(at_once, inputs, None, block.option)
        actual = values_and_gradients(compiled, inputs, None, block.option)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@both_blocks
def test_what_is_traced_launches_nothing(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake tensor has no memory that a kernel could cast."""
    monkeypatch.setattr(mixer_block, "in_dtype", None)
    with FakeTensorMode():
        inputs: dict[str, Any] = {name: torch.empty(value.shape) for name, value in block.problem(9).items()}
        inputs["in_proj"] = inputs["in_proj"].bfloat16()  # the dtype of the products; the others are float32
        outputs = block.at_once(None, block.option, **inputs)
    assert [value.dtype for value in outputs] == [torch.float32, torch.bfloat16, torch.bfloat16, torch.float32]


@both_blocks
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rates_of_fewer_bits_and_with_gaps(block: Block, device: str, dtype: torch.dtype) -> None:
    """A_log as mixed precision makes it, its columns apart."""
    inputs = {name: value.to(device, torch.float32) for name, value in block.problem(40, norms=False).items()}
    rates = inputs["A_log"].to(dtype)
    inputs["A_log"] = rates.T.contiguous().T if rates.dim() == 2 else rates
    wide = {name: value.double().cpu() for name, value in inputs.items()}
    _, expected = values_and_gradients(block.in_parts, wide, None, block.option)
    _, found = values_and_gradients(block.at_once, inputs, None, block.option)
    assert found["A_log"].dtype == dtype
    for name, gradient in found.items():
        error = (gradient.double().cpu() - expected[name]).norm() / expected[name].norm()
        assert error < (1e-4 if dtype == torch.float32 else 2e-2), name


@both_blocks
def test_frozen_weights_and_unused_outputs(block: Block) -> None:
    """What needs no gradient gets none, and outputs that no loss reads change nothing."""
    inputs = {name: value.float() for name, value in block.problem(9, states=False, norms=False).items()}
    leaves = {name: value.requires_grad_(name in ("update", "A_log")) for name, value in inputs.items()}
    for output in range(4):
        found = torch.autograd.grad(block.at_once(None, block.option, **leaves)[output].sum(), [leaves["update"]])
        wanted = torch.autograd.grad(block.in_parts(None, block.option, **leaves)[output].sum(), [leaves["update"]])
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@both_blocks
def test_an_input_of_a_wrong_shape_or_device_is_one_clear_line(block: Block) -> None:
    """Kernels take addresses: what is not refused here is read beyond its end."""
    segments = torch.zeros(BATCH, 5, dtype=torch.int64)
    inputs = block.problem(5) | {"segments": segments}

    def run(name: str, value: Tensor) -> None:
        given = inputs | {name: value}
        block.at_once(given.pop("segments"), block.option, **given)

    for name, value in inputs.items():
        shorter = value[..., :-1] if name == "conv_weight" else value[:-1]
        with pytest.raises(UserError, match=f"^{block.__name__.lower()}_block: "):
            run(name, value[None])
        if name not in ("conv_weight", "A_log", "dt_proj"):  # which say how many there are of others
            with pytest.raises(UserError, match=f"^{block.__name__.lower()}_block: "):
                run(name, shorter)
        with pytest.raises(UserError, match=r"is on .*, and .* on .*; move them to one device$"):
            run(name, value.to("meta"))


@both_blocks
def test_no_token_and_unknown_names(block: Block) -> None:
    with pytest.raises(UserError, match="hidden has no time step"):
        block.at_once(None, block.option, **block.problem(0))
    option, more = ("euler", {}) if block is Mamba1 else (False, {"discretization": "euler"})
    with pytest.raises(UserError, match="unknown discretization: 'euler'"):
        block.at_once(None, option, **block.problem(5), **more)


@pytest.mark.parametrize(
    ("block", "name", "message"),
    [
        (Mamba1, "D", r"mamba1_block: D must be \[d\] = \[24\], got \[23\]"),
        (Mamba1, "x_proj", r"mamba1_block: x_proj must be \[r\+2n d\] = \[19, 24\], got \[18, 24\]"),
        (Mamba1, "out_proj", r"mamba1_block: out_proj must be \[h d\] = \[16, 24\], got \[15, 24\]"),
        (Mamba2, "in_proj", "must be a multiple of the heads"),
        (Mamba2, "gate_norm", r"mamba2_block: gate_norm must be \[d\] = \[32\], got \[31\]"),
        (Mamba2, "out_proj", r"mamba2_block: out_proj must be \[h d\] = \[16, 32\], got \[15, 32\]"),
    ],
)
def test_wrong_shapes_are_one_clear_line(block: Block, name: str, message: str) -> None:
    inputs = block.problem(5, states=False)
    with pytest.raises(UserError, match=message):
        block.at_once(None, block.option, **inputs | {name: inputs[name][1:]})
