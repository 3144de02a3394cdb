"""Strange input to every op on every backend: a right value or one clear line, never a wrong number."""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from statespan import ops
from statespan.errors import UserError
from statespan.ops.dispatch import OPS

LENGTH = 19
HAS_GPU = torch.cuda.is_available()
Inputs = dict[str, Tensor]


def floats(*shape: int) -> Tensor:
    return torch.randn(shape)


def sizes_of_steps(*shape: int) -> Tensor:
    return torch.randn(shape) - 1


def scan(batch: int, *time: int) -> Inputs:
    d, g, n = 24, 2, 8
    return {
        "u": floats(batch, *time, d),
        "dt": sizes_of_steps(batch, *time, d),
        "A": -torch.rand(d, n) * 4 - 0.01,
        "B": floats(batch, *time, g, n),
        "C": floats(batch, *time, g, n),
        "D": floats(d),
        "z": floats(batch, *time, d),
        "dt_bias": floats(d) * 0.3,
        "initial_state" if time else "state": floats(batch, d, n),
    }


def ssd(batch: int, *time: int) -> Inputs:
    h, p, g, n = 4, 8, 2, 16
    return {
        "x": floats(batch, *time, h, p),
        "dt": sizes_of_steps(batch, *time, h),
        "A": -torch.rand(h) * 4 - 0.01,
        "B": floats(batch, *time, g, n),
        "C": floats(batch, *time, g, n),
        "D": floats(h),
        "dt_bias": floats(h) * 0.3,
        "initial_state" if time else "state": floats(batch, h, p, n),
    }


def conv(batch: int, *time: int) -> Inputs:
    d, k = 24, 4
    of_weight = {"weight": floats(d, k), "bias": floats(d)}
    return {
        "x": floats(batch, *time, d),
        **of_weight,
        "initial_state" if time else "state": floats(batch, k - 1, d),
    }


def experts(tokens: int) -> Inputs:
    e, h, f, k = 4, 16, 24, 2
    return {
        "x": floats(tokens, h),
        "expert_index": torch.rand(tokens, e).argsort(1)[:, :k],
        "expert_weight": torch.rand(tokens, k),
        "up_proj": floats(e, 2 * f, h) / 4,
        "down_proj": floats(e, h, f) / 4,
    }


def loss(tokens: int) -> Inputs:
    return {"hidden": floats(tokens, 16), "weight": floats(45, 16), "labels": torch.randint(0, 45, (tokens,))}


def norm(rows: int) -> Inputs:
    return {"x": floats(rows, 40), "residual": floats(rows, 40), "weight": floats(40)}


def gated_norm(rows: int) -> Inputs:
    return {"x": floats(rows, 7, 40), "z": floats(rows, 7, 40), "weight": floats(40)}


def linear(rows: int) -> Inputs:
    return {"x": floats(rows, 16), "weight": floats(24, 16), "bias": floats(24)}


def int8_experts(tokens: int) -> Inputs:
    inputs = experts(tokens)
    for name in ("up", "down"):
        rows, scale = zip(*map(ops.quantize_rows, inputs[f"{name}_proj"]), strict=True)
        inputs[f"{name}_proj"], inputs[f"{name}_scale"] = torch.stack(rows), torch.stack(scale)
    return inputs


def plain_experts(tokens: int) -> Inputs:
    inputs = experts(tokens)
    return {**inputs, "up_proj": inputs["up_proj"][:, :24].contiguous()}


def int8_linear(rows: int) -> Inputs:
    weight, scale = ops.quantize_rows(floats(24, 16))
    return {"x": floats(rows, 16), "weight": weight, "bias": floats(24), "scale": scale}


@dataclass(frozen=True)
class Case:
    """An op with its inputs for a batch; the inputs in `rows` have the batch in their first dimension."""

    name: str
    make: Callable[[int], Inputs]
    rows: tuple[str, ...]
    options: tuple[tuple[str, Any], ...] = ()
    gradients: bool = True  # of every backend
    variant: str = ""  # of the op, for the test's name
    causal: bool = True  # non-finite numbers go no further than in the reference

    def run(
        self, inputs: Inputs, backend: str, layout: Callable[[Tensor], Tensor] = lambda x: x, **more: Any
    ) -> Inputs:
        """Outputs and gradients, by name; `layout` says how the outputs' gradients lie in memory."""
        grads = self.gradients and all(v.numel() for name, v in inputs.items() if name in self.rows)
        leaves = {
            name: v.detach().requires_grad_(self.gradients and v.is_floating_point()) for name, v in inputs.items()
        }
        outputs = getattr(ops, self.name)(**leaves, **dict(self.options), **more, backend=backend)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        found = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
        if grads:
            on = {"generator": torch.Generator(outputs[0].device).manual_seed(1), "device": outputs[0].device}
            upstream = [layout(torch.randn(output.shape, **on).to(output.dtype)) for output in outputs]
            wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
            gradients = torch.autograd.grad(outputs, list(wanted.values()), upstream)
            found |= {f"gradient of {name}": value for name, value in zip(wanted, gradients, strict=True)}
        return found

    def truth(self, inputs: Inputs, dtype: torch.dtype = torch.float64, **more: Any) -> Inputs:
        wide = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
        return self.run(wide, "reference" if "reference" in OPS[self.name] else "torch", **more)


FINAL = (("return_final_state", True),)
EXPERT_ROWS = ("x", "expert_index", "expert_weight")
CASES = [
    Case("selective_scan", lambda b: scan(b, LENGTH), ("u", "dt", "B", "C", "z", "initial_state"), FINAL),
    Case("ssd", lambda b: ssd(b, LENGTH), ("x", "dt", "B", "C", "initial_state"), FINAL, causal=False),
    Case("causal_conv1d", lambda b: conv(b, LENGTH), ("x", "initial_state"), FINAL),
    Case("causal_conv1d_update", conv, ("x", "state"), gradients=False),
    Case("selective_state_update", scan, ("u", "dt", "B", "C", "z", "state"), gradients=False),
    Case("ssd_state_update", ssd, ("x", "dt", "B", "C", "state"), gradients=False),
    Case("rms_norm", norm, ("x", "residual"), (("eps", 1e-5),)),
    Case("gated_rms_norm", gated_norm, ("x", "z"), (("eps", 1e-5), ("group_size", 20))),
    Case("grouped_mlp", experts, EXPERT_ROWS),
    Case("linear_cross_entropy", loss, ("hidden", "labels"), (("reduction", "none"),)),
    Case("grouped_mlp", plain_experts, EXPERT_ROWS, (("activation", "relu"),), variant="relu"),
    Case("grouped_mlp", int8_experts, EXPERT_ROWS, gradients=False, variant="int8"),
    Case("linear", linear, ("x",)),
    Case("linear", int8_linear, ("x",), gradients=False, variant="int8"),
]


def runs_here(backend: str) -> bool:
    return HAS_GPU or backend not in ("cuda", "triton")


ALL = [
    pytest.param(case, backend, id="-".join(filter(None, (case.name, case.variant, backend))))
    for case in CASES
    for backend in OPS[case.name]
    if runs_here(backend)
]
RECURRENT = [p for p in ALL if "A" in p.values[0].make(1)]
SEQUENCES = [p for p in ALL if p.values[0].options == FINAL]


def close(found: Inputs, exact: Inputs, limit: float = 1e-5) -> None:
    assert found.keys() == exact.keys()
    for name, value in found.items():
        assert value.shape == exact[name].shape, name
        if value.numel():
            error = (value.double() - exact[name].double()).abs().max() / exact[name].abs().max().clamp(min=1e-3)
            assert error <= limit, f"{name}: {error:.1e} of the largest value"


# How tensors lie in memory.


def transposed(x: Tensor) -> Tensor:
    """The first dimension is the contiguous one; a vector has gaps."""
    if x.dim() == 1:
        return torch.stack([x, x.new_full(x.shape, -1)], dim=1)[:, 0]
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def misaligned(x: Tensor) -> Tensor:
    """Rows begin at odd places; what lies between them is no number."""
    nothing = float("nan") if x.is_floating_point() else -9
    wide = x.new_full((*x.shape[:-1], x.shape[-1] + 3), nothing)[..., 1 : 1 + x.shape[-1]]
    return wide.copy_(x)


def expanded(x: Tensor) -> Tensor:
    """The first of the batch, or the only number there is, everywhere: a stride is 0."""
    return x[:1].expand(x.shape)


@pytest.mark.parametrize("layout", [transposed, misaligned, expanded])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("case", "backend"), ALL)
def test_any_layout_of_inputs_and_gradients(
    case: Case, backend: str, dtype: torch.dtype, layout: Callable[[Tensor], Tensor], nan_in_new_tensors: None
) -> None:
    inputs = {
        name: v.to(dtype) if name in case.rows and v.is_floating_point() else v for name, v in case.make(3).items()
    }
    if case.name in ("grouped_mlp", "linear_cross_entropy"):
        mixed = ("up_scale", "down_scale")
        inputs = {n: v.to(dtype) if v.is_floating_point() and n not in mixed else v for n, v in inputs.items()}
    strange = {name: layout(value) for name, value in inputs.items()}
    if layout is expanded and case.name == "linear_cross_entropy":
        strange["weight"] = inputs["weight"]  # equal rows would cancel in the gradient of hidden
    found = case.run(strange, backend, layout)
    plain = {name: value.contiguous() for name, value in strange.items()}
    close(found, case.run(plain, backend, lambda x: layout(x).contiguous()), 1e-6 if dtype == torch.float32 else 2**-7)
    if dtype == torch.float32:
        close(found, case.truth(plain, layout=layout))


# Numbers that are none, or too large.


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("case", "backend"), ALL)
def test_a_bad_number_stays_in_its_row(case: Case, backend: str, value: float) -> None:
    """And where it goes there is what the reference says."""
    clean = case.make(3)
    expected = case.run(clean, backend)
    for name in case.rows:
        if not clean[name].is_floating_point():
            continue
        bad = {**clean, name: clean[name].clone()}
        bad[name][1].view(-1)[bad[name][1].numel() // 2] = value
        found, truth = case.run(bad, backend), case.truth(bad, torch.float32)
        for part, numbers in found.items():
            if part.startswith("gradient") and part.removeprefix("gradient of ") not in case.rows:
                continue  # sums over the rows
            for row in (0, 2):
                torch.testing.assert_close(numbers[row], expected[part][row], rtol=0, atol=0)
            lost, truly_lost = ~numbers.isfinite(), ~truth[part].isfinite()
            assert not (truly_lost & ~lost).any(), f"{part} hides the {value} of {name}"
            if case.causal and part.startswith("output"):
                assert not (lost & ~truly_lost).any(), f"the {value} of {name} spreads in {part}"


@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.parametrize("discretization", ["mamba", "zoh", "bilinear"])
@pytest.mark.parametrize(("case", "backend"), RECURRENT)
def test_steps_and_decays_at_the_ends_of_their_range(
    case: Case, backend: str, discretization: str, softplus: bool
) -> None:
    extremes = torch.tensor([1e4, 0.0, -1e4, 1e-30, 3.0] if softplus else [1e4, 0.0, 1e-30, 1e-4, 3.0])
    decays = torch.tensor([0.0, -1e4, -1e-30, -1.0])
    inputs = case.make(5)
    dt = inputs["dt"]
    turns = torch.arange(dt[0].numel()).view(dt[0].shape) // 7
    inputs["dt"] = extremes[(turns + torch.arange(5).view(-1, *[1] * turns.dim())) % 5]
    inputs["dt_bias"] = torch.zeros_like(inputs["dt_bias"])
    inputs["A"] = decays[torch.arange(inputs["A"].numel()).view(inputs["A"].shape) % 4]
    options = {"discretization": discretization, "dt_softplus": softplus}
    found, exact = case.run(inputs, backend, **options), case.truth(inputs, **options)
    assert all(value.isfinite().all() for value in exact.values())
    close(found, exact, 2e-5)


NUMBERS = {
    "each token its own": torch.arange(LENGTH),
    "two that take turns": torch.arange(LENGTH) % 2,
    "each its own, with padding": torch.where(torch.arange(LENGTH) % 3 == 0, -1, torch.arange(LENGTH)),
    "nothing but padding": torch.full((LENGTH,), -1),
    "large and falling": 2**40 - torch.arange(LENGTH) // 2,
}


@pytest.mark.parametrize("kind", NUMBERS)
@pytest.mark.parametrize(("case", "backend"), SEQUENCES)
def test_segments_of_a_token(case: Case, backend: str, kind: str, nan_in_new_tensors: None) -> None:
    inputs = case.make(2)
    inputs["segments"] = NUMBERS[kind].to(inputs["A" if "A" in inputs else "x"].device).expand(2, LENGTH)
    close(case.run(inputs, backend), case.truth(inputs))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int32])
@pytest.mark.parametrize(("case", "backend"), SEQUENCES)
def test_segments_of_any_whole_numbers(case: Case, backend: str, dtype: torch.dtype) -> None:
    """Also of those that have no -1."""
    inputs = case.make(2)
    numbers = (torch.arange(LENGTH) // 5 % 2).to(next(iter(inputs.values())).device).expand(2, LENGTH)
    close(case.run(inputs | {"segments": numbers.to(dtype)}, backend), case.truth(inputs | {"segments": numbers}))


# Nothing, and too much of it.


@pytest.mark.parametrize(("case", "backend"), ALL)
def test_a_batch_of_nothing(case: Case, backend: str) -> None:
    close(case.run(case.make(0), backend), case.truth(case.make(0)))
    if case.gradients:  # the weights' are zero
        leaves = {name: v.requires_grad_(v.is_floating_point()) for name, v in case.make(0).items()}
        outputs = getattr(ops, case.name)(**leaves, **dict(case.options), backend=backend)
        total = sum(output.sum() for output in (outputs if isinstance(outputs, tuple) else (outputs,)))
        for name, leaf in leaves.items():
            if leaf.requires_grad:
                gradient = torch.autograd.grad(
                    total, leaf, retain_graph=True, materialize_grads=True, allow_unused=True
                )
                assert (gradient[0] == 0).all() and gradient[0].shape == leaf.shape, name


@pytest.mark.parametrize(("case", "backend"), SEQUENCES)
def test_no_token(case: Case, backend: str) -> None:
    inputs = {name: v if v.shape[1:2] != (LENGTH,) else v[:, :0] for name, v in case.make(2).items()}
    if case.name == "causal_conv1d":
        y, state = case.run(inputs, backend).values()
        assert y.shape == (2, 0, 24) and torch.equal(state, inputs["initial_state"])
        return
    with pytest.raises(UserError, match=r"has no time step|at least one token"):
        case.run(inputs, backend)


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize(("case", "backend"), ALL)
def test_tensors_on_two_devices(case: Case, backend: str, gradients: bool) -> None:
    inputs = case.make(2)
    if gradients and not case.gradients:
        backend = "auto"  # the reference computes them
    for name in inputs:
        here = next(iter(inputs.values())).device
        there = torch.device("cpu" if here.type == "cuda" else "meta")
        split = {**inputs, name: inputs[name].to(there)}
        if gradients:
            split = {name: v.requires_grad_(v.is_floating_point()) for name, v in split.items()}
        with pytest.raises(UserError, match=f"^{case.name}: .* is on .*, and .* on .*; move them to one device$"):
            getattr(ops, case.name)(**split, **dict(case.options), backend=backend)


if HAS_GPU:

    def memory_that_is_left() -> list[torch.Tensor]:
        """All that may still be allocated, the memory that tests before kept reserved among it."""
        taken: list[torch.Tensor] = []
        size = 1 << 30
        while size >= 512:
            try:
                taken.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
            except torch.OutOfMemoryError:
                size //= 2
        return taken

    @pytest.mark.parametrize(("case", "backend"), [p for p in ALL if p.values[1] in ("cuda", "triton")])
    def test_out_of_memory_leaves_everything_as_it_was(case: Case, backend: str) -> None:
        small = case.make(2)
        expected = case.run(small, backend)
        gc.collect()
        torch.cuda.empty_cache()
        large = case.make((1 << 24) // small[case.rows[0]][0].numel())
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (1 << 20)) / total)
        try:
            taken = memory_that_is_left()
            with pytest.raises(torch.OutOfMemoryError):
                case.run(large, backend)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        del taken
        found = case.run(small, backend)
        assert all(torch.equal(value, expected[name]) for name, value in found.items())
