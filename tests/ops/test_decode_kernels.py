"""The CUDA kernels of decoding steps compile for every kind of GPU, without one: few spills, little shared memory."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from statespan.layers.config import Mamba1Config, Mamba2Config, MLPConfig, MoEConfig
from statespan.layers.mamba1 import Mamba1
from statespan.layers.mamba2 import Mamba2
from statespan.layers.mlp import MLP
from statespan.layers.moe import Int8Experts, MoE
from statespan.layers.norm import RMSNorm
from statespan.models.quantize import Int8Linear
from statespan.ops.cuda_kernels import compiler
from statespan.ops.decode_step import (
    HeadWeights,
    Projection,
    cuda,
    large,
    launch,
    multiply,
    project,
    stack,
    stream,
    tokens,
    update,
    verify,
)

ARCHS = ("sm_80", "sm_90", "sm_100", "sm_120")
SPILL_BYTES = 16
SHARED_BYTES = (48 << 10) - launch.UNASKED_BYTES  # static: with the dynamic part a block gets 48 KiB without asking
HIDDEN = 256
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def int8(layer: torch.nn.Module) -> torch.nn.Module:
    for name, child in list(layer.named_children()):
        if isinstance(child, torch.nn.Linear) and name != "router":
            setattr(layer, name, Int8Linear(child.weight, child.bias))
        elif name == "experts":
            setattr(layer, name, Int8Experts(child))
    return layer


def mixer_inputs(layer: Any, rows: int, stream: torch.dtype, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    state = layer.new_state(rows, torch.device("cpu"), dtype)
    return torch.zeros(rows, HIDDEN, dtype=stream), state.conv, state.ssm


def mamba1(rows: int, dtype=BF16, stream=F32, quantize=False, **changes: object):
    layer = Mamba1(HIDDEN, Mamba1Config(**changes)).to(dtype)
    layer = int8(layer) if quantize else layer
    step = cuda.mamba1(layer.step_weights(RMSNorm(HIDDEN, 1e-5).to(dtype)), rows, stream, dtype)
    return step, mixer_inputs(layer, rows, stream, dtype)


def mamba2(rows: int, dtype=BF16, stream=F32, **changes: object):
    layer = Mamba2(HIDDEN, Mamba2Config(**changes)).to(dtype)
    step = cuda.mamba2(layer.step_weights(RMSNorm(HIDDEN, 1e-5).to(dtype)), rows, stream, dtype)
    return step, mixer_inputs(layer, rows, stream, dtype)


def verified(kind: str, rows: int, count: int, dtype=BF16, stream=F32, quantize=False, **changes: object):
    """Several tokens a row."""
    layer: Any = (
        Mamba1(HIDDEN, Mamba1Config(**changes)) if kind == "mamba1" else Mamba2(HIDDEN, Mamba2Config(**changes))
    )
    layer = int8(layer.to(dtype)) if quantize else layer.to(dtype)
    make = verify.mamba1 if kind == "mamba1" else verify.mamba2
    step = make(layer.step_weights(RMSNorm(HIDDEN, 1e-5).to(dtype)), rows, count, stream, dtype)
    before, kept = (layer.new_state(size, torch.device("cpu"), dtype) for size in (rows, rows * count))
    return step, (torch.zeros(rows * count, HIDDEN, dtype=stream), before.conv, before.ssm, kept.conv, kept.ssm)


def streamed(rows: int, outputs: int, inputs: int, dtype=BF16, before: Any = None, **options: Any):
    """A product of few rows on matrix units."""
    projection = Projection(torch.zeros(outputs, inputs, dtype=dtype))
    step = stream.Stream(projection, rows, F32, before=before, **options)
    size = outputs // 2 if options.get("after") == "swiglu" else outputs
    return lambda x: step(x, torch.zeros(rows, size), z=torch.zeros(rows, inputs)), (torch.zeros(rows, inputs),)


def feed_forward(rows: int, layer: torch.nn.Module, dtype=BF16, quantize=False):
    layer = int8(layer.to(dtype)) if quantize else layer.to(dtype)
    step = cuda.feed_forward(layer.step_weights(RMSNorm(HIDDEN, 1e-5).to(dtype)), rows, F32)
    return step, (torch.zeros(rows, HIDDEN),)


def experts(rows: int, **changes: object):
    return feed_forward(rows, MoE(HIDDEN, MoEConfig(num_experts=4, intermediate_size=512)), **changes)


def head(rows: int, dtype=BF16):
    weight = torch.zeros(999, HIDDEN, dtype=dtype)
    step = cuda.head(HeadWeights(torch.zeros(HIDDEN, dtype=dtype), 1e-5, Projection(weight), 997), rows, F32)
    return step, (torch.zeros(rows, HIDDEN),)


def mamba1_stack(width: int, blocks: int, rows=1, stream=F32, **changes: object):
    pairs = [(Mamba1(width, Mamba1Config(**changes)).to(BF16), RMSNorm(width, 1e-5).to(BF16)) for _ in range(blocks)]
    states = [layer.new_state(rows, torch.device("cpu"), BF16) for layer, _ in pairs]
    weights = [layer.step_weights(norm) for layer, norm in pairs]
    step = stack.mamba1_stack(weights, [(state.conv, state.ssm) for state in states], stream)
    return step, (torch.zeros(rows, width, dtype=stream),)


def ends(rows: int, dtype=BF16):
    """Tokens to the residual stream, and logits to tokens."""
    embed = tokens.kernel_embedder(torch.zeros(99, HIDDEN, dtype=dtype), rows, F32)
    choose = tokens.chooser.__wrapped__(torch.device("cpu"), rows)
    ids = torch.zeros(rows, dtype=torch.int64)
    best = torch.zeros(rows)

    def step(logits: torch.Tensor) -> None:
        embed(ids)
        choose(logits, logits.stride(0), 999, ids, best)

    return step, (torch.zeros(rows, 999),)


def normed(size: int, dtype=BF16) -> project.Normed:
    return project.Normed(torch.zeros(size, dtype=dtype), 1e-5)


def gated(size: int) -> project.Gated:
    return project.Gated(torch.zeros(size, dtype=BF16), 1e-5, size, norm_first=True)


CASES: dict[str, Callable[[], Any]] = {
    "mamba1": lambda: mamba1(1),
    "mamba1, 8 rows": lambda: mamba1(8),
    "mamba1, many rows": lambda: mamba1(64),
    "mamba1, 128 rows, inner norms": lambda: mamba1(128, dt_rank=40, inner_norms=True, proj_bias=True),
    "mamba1, many rows, float16": lambda: mamba1(9, dtype=F16, stream=F16, conv_bias=False, discretization="zoh"),
    "mamba1, many rows, odd": lambda: mamba1(12, dt_rank=3),
    "mamba1, float16": lambda: mamba1(3, dtype=F16, stream=F16),
    "mamba1, int8, odd": lambda: mamba1(2, quantize=True, inner_norms=True, state_size=5, dt_rank=3, proj_bias=True),
    "mamba1, float32, wide state": lambda: mamba1(1, dtype=F32, state_size=128, discretization="zoh", conv_kernel=1),
    "mamba1, many rows, float32": lambda: mamba1(9, dtype=F32),
    "mamba2": lambda: mamba2(1),
    "mamba2, many rows": lambda: mamba2(64),
    "mamba2, groups": lambda: mamba2(5, num_groups=4, head_dim=32, norm_before_gate=True, discretization="bilinear"),
    "stream": lambda: streamed(5, 5120, 2560, before=normed(2560)),
    "stream, 8 rows": lambda: streamed(8, 2560, 5120, before=gated(5120), add=True),
    "stream, swiglu": lambda: streamed(4, 14336, 4096, before=normed(4096), after="swiglu"),
    "stream, float16": lambda: streamed(2, 1003, 72, dtype=F16, before=normed(72, F16), after="gelu"),
    "verify, mamba1": lambda: verified("mamba1", 1, 5),
    "verify, mamba1, many rows": lambda: verified("mamba1", 8, 5, inner_norms=True),
    "verify, mamba1, 16 rows": lambda: verified("mamba1", 16, 5, inner_norms=True),
    "verify, mamba1, int8, odd": lambda: verified(
        "mamba1", 2, 3, quantize=True, state_size=5, dt_rank=3, conv_kernel=2
    ),
    "verify, mamba1, 16 tokens": lambda: verified("mamba1", 1, 16, dtype=F16, stream=F16, discretization="zoh"),
    "verify, mamba2": lambda: verified("mamba2", 1, 7),
    "verify, mamba2, many rows": lambda: verified("mamba2", 3, 5, num_groups=4, head_dim=32, norm_before_gate=True),
    "mlp": lambda: feed_forward(1, MLP(HIDDEN, MLPConfig(intermediate_size=512))),
    "mlp, gelu": lambda: feed_forward(4, MLP(HIDDEN, MLPConfig(intermediate_size=512, activation="gelu", bias=True))),
    "experts": lambda: experts(1),
    "experts, int8": lambda: experts(3, quantize=True),
    "head": lambda: head(1),
    "head, many rows": lambda: head(64),
    "ends": lambda: ends(2),
    "stack": lambda: mamba1_stack(768, 3),
    "stack, wide": lambda: mamba1_stack(2560, 2, conv_bias=False, discretization="zoh"),
    "stack, many rows": lambda: mamba1_stack(2560, 2, rows=64),
    "stack, 128 rows, largest rank": lambda: mamba1_stack(512, 2, rows=128, dt_rank=256),
    "stack, 130 rows": lambda: mamba1_stack(256, 2, rows=130, conv_bias=False, inner_norms=True, dt_rank=24),
    "stack, 100 rows, bfloat16": lambda: mamba1_stack(2048, 2, rows=100, stream=BF16, conv_kernel=2),
    "stack, bfloat16": lambda: mamba1_stack(1536, 2, stream=BF16, discretization="bilinear", conv_kernel=2),
    "head, float32": lambda: head(8, dtype=F32),
}
EVERYWHERE = (
    "mamba1",
    "mamba2, groups",
    "experts",
    "mamba2, many rows",
    "verify, mamba1",
    "ends",
)  # on every kind of GPU; the others on one


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> set[tuple[str, tuple[tuple[str, str | int], ...]]]:
    """What would be loaded: names and macros."""
    found: set[tuple[str, tuple[tuple[str, str | int], ...]]] = set()
    monkeypatch.setattr(launch, "_load", lambda name, device, arch, macros: found.add((name, macros)))
    monkeypatch.setattr(large, "tensor_map", lambda weight, tile: torch.zeros(16, dtype=torch.int64))
    monkeypatch.setattr(launch, "allow_shared", lambda *_: None)
    monkeypatch.setattr(verify, "wide_product", lambda x, weight: torch.zeros(len(x), len(weight)))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (9, 0))
    for module in (project, multiply, update, stack, large, stream):
        monkeypatch.setattr(module, "multiprocessors", lambda device: 132)
    for module in (project, multiply, update, stack, large, stream):
        monkeypatch.setattr(module, "shared_memory", lambda device: 227 << 10)
    return found


@pytest.mark.parametrize(("case", "arch"), [(c, a) for c in CASES for a in ARCHS if c in EVERYWHERE or a == "sm_90"])
def test_steps_compile(case: str, arch: str, launched) -> None:
    with torch.no_grad():
        assert CASES[case]()[0] is not None
    assert launched
    for name, macros in launched:
        log: list[str] = []
        own = "a" if name == "large" else ""
        code = compiler.compile_cubin(launch.HERE / f"{name}.cu", arch + own, dict(macros), log)
        text = "".join(log)
        assert code[:4] == b"\x7fELF" and "bytes spill stores" in text
        assert max(int(count) for count in re.findall(r"(\d+) bytes spill stores", text)) <= SPILL_BYTES, text
        assert max([0, *(int(count) for count in re.findall(r"(\d+) bytes smem", text))]) <= SHARED_BYTES, text


TYPES = {
    **{"float": F32, "bfloat16": BF16, "float16": F16, "int8": torch.int8, "int": torch.int32, "i64": torch.int64},
    **{"u32": torch.int32, "uint2": torch.int32, "Layer": torch.int64},  # a number and its epoch; addresses
}


def parameters(name: str) -> list[str]:
    """Of a kernel, as its source declares them."""
    text = compiler.source_of(launch.HERE / f"{name}.cu")
    (signature,) = re.findall(rf"__launch_bounds__\([^)]+\) {name}\((.*?)\) \{{", text, flags=re.DOTALL)
    return [part.strip() for part in signature.split(",")]


@pytest.mark.parametrize("arch", ["sm_100", "sm_120"])
def test_the_stack_compiles_for_newer_gpus(arch: str, launched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stack, "shared_memory", lambda device: (99 if arch == "sm_120" else 227) << 10)
    assert CASES["stack"]()[0] is not None
    for name, macros in launched:
        assert compiler.compile_cubin(launch.HERE / f"{name}.cu", arch, dict(macros))[:4] == b"\x7fELF"


@pytest.mark.parametrize("case", CASES)
def test_every_argument_is_what_the_kernel_takes(case: str, launched, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch passes addresses and nobody looks at types: their number, kinds and dtypes must be right."""
    calls: list[str] = []
    made = launch.Launch.__init__

    def init(self: Any, name: str, device: Any, grid: Any, threads: int, macros: Any, *rest: int, **more: int) -> None:
        made(self, name, device, grid, threads, macros, *rest, **more)
        self.of = name, dict(macros)

    def call(self: Any, *arguments: Any) -> None:
        name, macros = self.of
        declared = parameters(name)
        assert len(arguments) == len(declared), name
        for argument, parameter in zip(arguments, declared, strict=True):
            if parameter.startswith("i64 "):
                assert isinstance(argument, int), (name, parameter)
                continue
            assert argument is None or isinstance(argument, torch.Tensor), (name, parameter)
            kind = parameter.removeprefix("const ").split("*")[0].strip()
            if argument is not None and kind != "void":
                assert argument.dtype == TYPES[macros.get(kind, kind)], (name, parameter)
        calls.append(name)

    monkeypatch.setattr(launch.Launch, "__init__", init)
    monkeypatch.setattr(launch.Launch, "__call__", call)
    with torch.inference_mode():
        step, inputs = CASES[case]()
        step(*inputs)
    assert calls


def test_tokens_of_32_bits_are_widened(launched, monkeypatch: pytest.MonkeyPatch) -> None:
    """As PyTorch's embedding takes them; the kernel reads 64 bits of each."""
    passed: list[torch.Tensor] = []
    monkeypatch.setattr(launch.Launch, "__call__", lambda self, ids, *_: passed.append(ids))
    embed = tokens.kernel_embedder(torch.zeros(50, HIDDEN, dtype=BF16), 3, F32)
    for dtype in (torch.int32, torch.int64):
        embed(torch.tensor([[4, 0], [7, 0], [2, 0]], dtype=dtype)[:, 0])
        assert passed[-1].dtype == torch.int64 and passed[-1].is_contiguous() and passed[-1].tolist() == [4, 7, 2]


def test_every_kernel_file_is_compiled_here(launched) -> None:
    with torch.no_grad():
        for case in CASES.values():
            case()
    assert {name for name, _ in launched} == {file.stem for file in launch.HERE.glob("*.cu")}


def test_weights_that_cannot_be_read_by_16_bytes_are_left_to_the_layers(launched) -> None:
    layer = Mamba1(HIDDEN + 4, Mamba1Config()).to(BF16)
    assert cuda.mamba1(layer.step_weights(RMSNorm(HIDDEN + 4, 1e-5).to(BF16)), 1, F32, BF16) is None
    assert cuda.feed_forward(_moe(MoEConfig(num_experts=4, intermediate_size=20)), 1, F32) is None
    assert not launched


def aside(value: torch.Tensor) -> torch.Tensor:
    """A copy that begins 4 bytes behind a multiple of 16, as a parameter in one memory of many may."""
    memory = value.new_zeros(value.numel() + 4 // value.element_size())
    return memory[4 // value.element_size() :].view(value.shape).copy_(value)


SMALL = ("norm", "conv_weight", "conv_bias", "dt_bias", "A_log", "D")  # beside the projections


@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("name", SMALL)
def test_parameters_that_begin_between_16_bytes_are_left_to_the_layers(name: str, rows: int, launched) -> None:
    """The kernels load some of them by 16 bytes; where these are not aligned, the GPU stops for good."""
    width = 512
    with torch.no_grad():
        pairs = [(Mamba1(width, Mamba1Config()).to(BF16), RMSNorm(width, 1e-5).to(BF16)) for _ in range(2)]
        states = [layer.new_state(rows, torch.device("cpu"), BF16) for layer, _ in pairs]
        first, second = (layer.step_weights(norm) for layer, norm in pairs)
        strange = dataclasses.replace(second, **{name: aside(getattr(second, name))})
        places = [(state.conv, state.ssm) for state in states]
        assert stack.mamba1_stack([first, second], places, F32) is not None
        assert stack.mamba1_stack([first, strange], places, F32) is None
        assert cuda.mamba1(first, rows, F32, BF16) is not None
        assert cuda.mamba1(strange, rows, F32, BF16) is None
        assert verify.mamba1(strange, rows, 3, F32, BF16) is None
        if name == "norm":
            weights = HeadWeights(strange.norm, 1e-5, first.in_proj, 100)
            assert cuda.head(dataclasses.replace(weights, norm=first.norm), rows, F32) is not None
            assert cuda.head(weights, rows, F32) is None


@pytest.mark.parametrize("rows", [1, 16])
def test_the_norm_of_an_mlp_that_begins_between_16_bytes(rows: int, launched) -> None:
    with torch.no_grad():
        weights = MLP(HIDDEN, MLPConfig(intermediate_size=512)).to(BF16).step_weights(RMSNorm(HIDDEN, 1e-5).to(BF16))
        assert cuda.feed_forward(weights, rows, F32) is not None
        launched.clear()
        assert cuda.feed_forward(dataclasses.replace(weights, norm=aside(weights.norm)), rows, F32) is not None
    assert not launched  # PyTorch's products, and a norm that takes it


@pytest.mark.parametrize("change", [lambda x: x.to(BF16), lambda x: x.t().contiguous().t()])
@pytest.mark.parametrize("rows", [1, 16])
def test_decays_of_another_kind_are_left_to_the_layers(rows: int, change, launched) -> None:
    """Kernels take addresses of float32 without gaps."""
    with torch.no_grad():
        layer, norm = Mamba1(512, Mamba1Config()).to(BF16), RMSNorm(512, 1e-5).to(BF16)
        state, weights = layer.new_state(rows, torch.device("cpu"), BF16), layer.step_weights(norm)
        strange = dataclasses.replace(weights, A_log=change(weights.A_log))
        assert stack.mamba1_stack([strange, strange], [(state.conv, state.ssm)] * 2, F32) is None
        assert cuda.mamba1(strange, rows, F32, BF16) is None


def _moe(config: MoEConfig):
    return MoE(HIDDEN, config).to(BF16).step_weights(RMSNorm(HIDDEN, 1e-5).to(BF16))
