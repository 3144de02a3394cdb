"""The Triton kernels without a GPU: each compiles for every target without spilling, and is right in the interpreter.

`make triton-releases` repeats the compilation with every Triton release that is supported.
"""

import os
import re
import struct
import subprocess
import sys
from importlib import import_module
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

if sys.platform != "linux":
    pytest.skip("Triton is published for Linux only", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from statespan.ops.grouped_mlp import triton_backward, triton_many, triton_routing
from statespan.ops.grouped_mlp.experts import Experts
from statespan.ops.selective_scan import inputs as scan_inputs
from statespan.ops.ssd import triton_plan
from statespan.ops.ssd.inputs import Inputs, Options
from statespan.ops.triton_kernels.weights import add_rows, cast, sum_of_parts

BACKENDS = {
    op: import_module(f"statespan.ops.{op}.triton_backend")
    for op in (
        "rms_norm",
        "causal_conv1d",
        "state_update",
        "linear_cross_entropy",
        "selective_scan",
        "grouped_mlp",
        "decode_attention",
        "ssd",
    )
}
SHARED_KIB = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}
TARGETS = {
    **{name: GPUTarget("cuda", int(name[3:]), 32) for name in SHARED_KIB if name.startswith("sm_")},
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# The assembler gives up some registers of a thread where that lets one more warp run beside it. The experts'
# products do so once a tile, behind the loop, for gelu's polynomial or what is kept. ssd's gradients hold more tiles
# than there are registers for: smaller tiles spill less and took longer.
SPILL_BYTES = {"selective_scan": 24, "grouped_mlp": 208, "ssd": 1856}
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64", torch.int8: "*i8", torch.int32: "*i32"}
BF16 = torch.bfloat16


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def launch_all() -> None:
    """Every kernel once or more, at the sizes of a 2.7b model."""
    norm, conv, update, loss, scan, experts, attention, dual = BACKENDS.values()
    x, residual, weight = empty(64, 5120, dtype=BF16), empty(64, 5120), empty(5120)
    norm.add_rms_norm(x, residual, weight, 1e-5, BF16)
    norm.rms_norm_backward(x, residual, residual, weight, 1e-5)
    norm.rms_norm_backward(x, residual, residual, weight, 1e-5, x, x)
    norm.add_rms_norm(x, residual, weight, 1e-5, BF16, weight[:64])
    norm.rms_norm_backward(x, residual, x, weight, 1e-5, x, None, weight[:64], torch.float32)
    norm.gated_rms_norm(x, x, weight, 1e-5, 5120, False)
    norm.gated_rms_norm_backward(x, x, x, weight, 1e-5, 5120, False)
    norm.gated_rms_norm_backward(x, x, x, weight, 1e-5, 5120, False, empty(64, 10240, dtype=BF16)[:, :5120], x)

    cast(BF16, [empty(5120, 2560), empty(2560, 5120)])
    cast(BF16, [empty(5120, 2560), empty(2560, 5120), empty(192, 5120), empty(5120, 160)])
    sum_of_parts(empty(500, 5120), weight)
    sum_of_parts(empty(48, 25600), empty(5120, 4), weight)
    add_rows(empty(50280, 2560), torch.zeros(99, dtype=torch.int64), empty(99, 2560))
    add_rows(empty(50280, 2560, dtype=BF16), torch.zeros(99, dtype=torch.int64), empty(99, 2560, dtype=BF16))

    x, taps, bias = empty(2, 300, 10240, dtype=BF16)[..., :5120], empty(5120, 4), empty(5120)
    grad, state, segments = empty(2, 300, 5120, dtype=BF16), empty(2, 3, 5120, dtype=BF16), empty(2, 300).long()
    conv.forward(x, taps, bias, None, None, True)
    conv.forward(x, taps, bias, state, segments, True)
    conv.backward(grad, state, x, taps, bias, None, None, True)
    conv.backward(grad, state, x, taps, bias, state, segments, True)
    conv.update(state, x[:, 0], taps, bias, True)

    x, B = x[:, 0], empty(2, 1, 16, dtype=BF16)
    update.selective_state_update(
        empty(2, 5120, 16), x, x, empty(5120, 16), B, B, bias, x, bias, True, discretization="zoh"
    )
    B, D = empty(2, 1, 128, dtype=BF16), empty(80)
    x, dt = empty(2, 80, 64, dtype=BF16), empty(2, 80, dtype=BF16)
    update.ssd_state_update(empty(2, 80, 64, 128), x, dt, D, B, B, D, D, True, (0.0, float("inf")), "mamba")

    loss.losses_and_gradients(empty(9, 5056)[:, :5003], torch.arange(9), None, 5003, True)

    x, z = empty(2, 70, 10240, dtype=BF16).chunk(2, dim=-1)
    matrix, rates, channels = empty(2, 70, 1, 16, dtype=BF16), empty(5120, 16), empty(5120)
    for segments, discretization in ((None, "mamba"), (empty(2, 70).long(), "zoh")):
        inputs = scan_inputs.Inputs(x, x, rates, matrix, matrix, channels, z, channels, None, segments)
        options = scan_inputs.Options(True, discretization)
        *_, starts = scan.selective_scan(inputs, options, True)
        scan.gradients(x, None, starts, inputs, options)

    launch_experts(experts)
    query, cache, position = empty(2, 32, 128, dtype=BF16), empty(2, 9000, 8, 128, dtype=BF16), empty(2, 9000).int()
    attention.decode_attention(query, cache, cache, position, position[0, :1], position[:, 0], 4096, 0.1)
    for window, page_size in ((None, 200), (4096, 64)):
        pages = empty(90, page_size, 8, 128, dtype=BF16)
        attention.paged_decode_attention(query, pages, pages, position, position[:, 0], window, 0.1)
        qkv, angles = empty(2, 48, 128, dtype=BF16), (empty(2, 64), empty(2, 64))
        attention.append_token(qkv, pages, pages, torch.zeros(2, dtype=torch.int64), angles, page_size == 64)
    launch_ssd(dual)


def launch_experts(experts: ModuleType) -> None:
    """One token and many with int8 weights, and many tokens forward and backward."""
    index, chosen = torch.zeros(2048, 2, dtype=torch.int64), empty(2048, 2)
    up, down = empty(8, 4096, 1024, dtype=torch.int8), empty(8, 1024, 2048, dtype=torch.int8)
    x, up_bias, down_bias = empty(2048, 1024, dtype=BF16), empty(8, 4096, dtype=BF16), empty(8, 1024, dtype=BF16)
    int8 = Experts(up, down, up_bias, down_bias, empty(8, 4096), empty(8, 1024))
    experts.forward(x[:1], index[:1], chosen[:1], int8, "swiglu", False)
    experts.forward(x[:60], index[:60, :1], chosen[:60, :1], int8, "swiglu", False)  # y without adding up
    for tokens in (200, 256):  # 50 and 64 rows an expert
        experts.forward(x[:tokens], index[:tokens], chosen[:tokens], int8, "swiglu", False)
    experts.forward(x, index, chosen, int8, "swiglu", False)  # enough rows for a copy of the weights
    wide = Experts(
        empty(2, 8192, 4096, dtype=torch.int8),
        empty(2, 4096, 4096, dtype=torch.int8),
        None,
        None,
        empty(2, 8192),
        empty(2, 4096),
    )
    experts.forward(empty(64, 4096, dtype=BF16), index[:64], chosen[:64], wide, "swiglu", False)
    float16 = Experts(up.to(BF16), down.to(BF16), up_bias, down_bias)
    _, kept = experts.forward(x, index, chosen, float16, "swiglu", True)
    triton_backward.backward(x, kept, x, index, chosen, float16, "swiglu")
    plain = Experts(float16.up_proj[:, :2048].contiguous(), float16.down_proj, None, None)
    experts.forward(x, index, chosen, plain, "gelu", False)
    if triton_many.shared_memory(x.device) >= triton_many.SHARED:  # so few rows that the sums take shorter steps
        places = triton_routing.sort(index[:500], 8, 64)
        triton_many.weight_gradients(x[:1504], x[:1504], places, empty(8, 1024, 1024, dtype=BF16))


def launch_ssd(dual: ModuleType) -> None:
    """A long row in splits with 128 states; float32 with segments, negative decays and D for each place; odd sizes."""
    for dtype, states, discretization in ((BF16, 128, "mamba"), (torch.float32, 64, "bilinear")):
        plain = dtype == BF16
        length, heads = (5000, 8) if plain else (70, 300)
        x, matrix = empty(2, length, heads, 64, dtype=dtype), empty(2, length, 1, states, dtype=dtype)
        dt, rates, skip = empty(2, length, heads, dtype=dtype), empty(heads), empty(heads)
        state = empty(2, heads, 64, states)
        segments = None if plain else empty(2, length).long()
        skip, given = (skip, None) if plain else (empty(heads, 64), state)
        inputs = Inputs(x, dt, rates, matrix, matrix, skip, rates, given, segments)
        options = Options(True, (0.0, float("inf")), 256, discretization)
        dual.forward(inputs, options)
        dual.backward(x, state, inputs, options)
    x, matrix, rates = empty(2, 70, 12, 8, dtype=BF16), empty(2, 70, 1, 20, dtype=BF16), empty(12)
    dual.forward(Inputs(x, x[..., 0], rates, matrix, matrix, rates, rates, None, None), options)


def source_of(kernel: JITFunction, arguments: dict[str, Any]) -> ASTSource:
    """The kernel for these arguments, specialised as a launch would."""
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        aligned = value.data_ptr() % 16 == 0 if isinstance(value, Tensor) else value
        if isinstance(value, Tensor):
            signature[parameter.name] = TYPES[value.dtype]
        elif isinstance(value, TensorDescriptor):
            signature[parameter.name] = f"tensordesc<{TYPES[value.base.dtype][1:]}{list(value.block_shape)}>"
            continue
        elif parameter.is_constexpr or value is None or (value == 1 and not parameter.do_not_specialize):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        else:
            aligned = isinstance(value, int) and value % 16 == 0 and not parameter.do_not_specialize
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
        if aligned:
            attributes[(place,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def unwritten_registers(disassembly: str) -> list[str]:
    """Instructions (for sm_80, sm_90) that read a uniform register which none before them has written.

    Before them in memory, which is enough: what jumps back has come this way. It was seen in kernels with products,
    where a tile's address is in such registers.
    """
    written: set[int] = set()
    found = []
    for instruction in re.findall(r"/\*[0-9a-f]{4,}\*/ +(.*?) *;", disassembly):
        operation, _, rest = re.sub(r"^@!?U?P\w+ +", "", instruction).partition(" ")
        if operation.startswith("CALL"):  # what a function writes is not followed
            break
        first, *others = [operand.strip() for operand in rest.split(",")]
        if operation.startswith("R2UR") and first.startswith("P"):  # it sets a predicate too
            first = others.pop(0)
        target = re.fullmatch(r"UR(\d+)", first)
        wide, pairs = "WIDE" in operation, ".64" in operation
        read: set[int] = set()
        for operand in others if target else (first, *others):
            for kind, number, pair in re.findall(r"(g?desc\[)?\bUR(\d+)(\.64)?", operand):
                summand = wide and operand is others[-1]
                start, count = int(number), 2 if kind == "desc[" or pair or summand or (target and pairs) else 1
                if kind == "gdesc[":  # of two factors, the first of which may be in registers
                    start, count = (start + 2, 2) if re.match(r"R\d", others[0]) else (start, 4)
                read.update(range(start, start + count))
        if read - written:
            found.append(instruction)
        if target:
            written.update(range(int(target[1]), int(target[1]) + (2 if wide or pairs else 1)))
    return found


def test_unwritten_registers_are_found() -> None:
    """As Triton 3.6 compiled the SSD for heads of 8 places: an address in the second product comes from nowhere."""
    text = """
        /*0080*/                   ULDC.64 UR4, c[0x0][0x230] ;
        /*0090*/                   IADD3 R195, P1, R15, UR4, RZ ;
        /*00a0*/              @!P1 LDGSTS.E.64 [R168+0x3160], desc[UR4][R14.64+0x60], P2 ;
        /*00b0*/                   UIADD3 UR16, UP0, UR16, 0x20, URZ ;
        /*00c0*/                   UMOV UR7, 0xc0000010 ;
        /*00d0*/                   UMOV UR6, UR4 ;
        /*00e0*/                   HGMMA.64x16x16.F32.BF16 R56, R24, gdesc[UR4].tnspB, R56 ;
        /*00f0*/                   HGMMA.64x16x16.F32.BF16 R56, gdesc[UR4], R56, gsb0 ;
        /*0100*/                   HGMMA.64x16x16.F32.BF16 R56, R28, gdesc[UR8].tnspB, R56 ;
    """
    instructions = unwritten_registers(text)
    assert [instruction.split()[0] for instruction in instructions] == ["UIADD3", "HGMMA.64x16x16.F32.BF16"]
    assert "gdesc[UR8]" in instructions[1]


@pytest.fixture
def launches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[tuple[ASTSource, dict[str, int]]]:
    """What the backends would launch on a GPU of the test's target."""
    found = []

    def record(kernel: JITFunction, *values: Any, grid: Any, warmup: bool, **named: Any) -> None:
        assert named.pop("enable_fp_fusion")  # by `launcher.start`: the default differs between releases
        options = {name: named.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in named}
        found.append((source_of(kernel, dict(zip(kernel.arg_names, values, strict=False)) | named), options))

    shared = SHARED_KIB[request.node.callspec.params["target"]] << 10
    monkeypatch.setattr(JITFunction, "run", record)
    for name in ("rms_norm", "grouped_mlp", "decode_attention", "ssd"):
        monkeypatch.setattr(BACKENDS[name], "shared_memory", lambda device: shared)
    monkeypatch.setattr(triton_many, "shared_memory", lambda device: shared)
    monkeypatch.setattr(triton_many, "hopper", lambda device: request.node.callspec.params["target"] == "sm_90")
    for backend in (*BACKENDS.values(), triton_many, triton_plan):
        monkeypatch.setattr(backend, "multiprocessors", lambda device: 132, raising=False)
    monkeypatch.setattr(triton_plan, "precision", lambda device: "bf16x6")
    launch_all()
    return found


def said_of(binary: Path, tool: str, *options: str) -> str:
    """What one of the tools that come with Triton prints."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    return subprocess.run([str(path), *options, str(binary)], capture_output=True, text=True, check=True).stdout


def machine_code(cubin: bytes) -> bytes:
    """The instructions in an ELF file, 16 bytes each: its one section that is executable."""
    (table,), (size, count) = struct.unpack_from("<Q", cubin, 40), struct.unpack_from("<HH", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + size * index) for index in range(count)]
    ((_, _, _, _, offset, length),) = [section for section in sections if section[2] & 4]  # SHF_EXECINSTR
    return cubin[offset : offset + length]


def disassembled(codes: list[bytes], target: str, scratch: Path) -> list[str]:
    """The text of each kernel, by one call: nvdisasm takes a third of a second to start."""
    scratch.write_bytes(b"".join(codes))
    lines = said_of(scratch, "nvdisasm", "-b", target.replace("sm_", "SM")).splitlines()
    instructions = [line for line in lines if re.match(r"\s*/\*[0-9a-f]{4,}\*/", line)]
    assert len(instructions) == sum(map(len, codes)) // 16
    left = iter(instructions)
    return ["\n".join(islice(left, len(code) // 16)) for code in codes]


@pytest.mark.parametrize("target", SHARED_KIB)
def test_every_kernel_compiles_and_fits(
    target: str, launches: list[tuple[ASTSource, dict[str, int]]], tmp_path: Path
) -> None:
    assert len(launches) == (120 if target in ("sm_90", "sm_100") else 110)  # these copy tiles by descriptors
    binaries: dict[bytes, str] = {}  # kernels are launched with other sizes again
    for source, options in launches:
        compiled = triton.compile(source, target=TARGETS[target], options=options)
        assert compiled.metadata.shared <= SHARED_KIB[target] << 10, source.name
        if target.startswith("sm_") and (binary := compiled.asm["cubin"]) not in binaries:
            binaries[binary] = source.name
            (tmp_path / "kernel.cubin").write_bytes(binary)
            usage = said_of(tmp_path / "kernel.cubin", "cuobjdump", "--dump-resource-usage")
            assert "LOCAL:0" in usage, f"{source.name}: {usage}"
            spilled = re.search(r"STACK:(\d+)", usage)
            assert spilled is not None
            assert int(spilled[1]) <= SPILL_BYTES.get(source.fn.__module__.split(".")[-2], 0), f"{source.name}: {usage}"
    if target in ("sm_80", "sm_90"):
        texts = disassembled(list(map(machine_code, binaries)), target, tmp_path / "code")
        for name, text in zip(binaries.values(), texts, strict=True):
            assert not unwritten_registers(text), f"{name}: {unwritten_registers(text)[0]}"


@pytest.mark.parametrize(
    "group",
    [
        "weights",
        "rms_norm",
        "causal_conv1d",
        "state_update",
        "selective_scan",
        "linear_cross_entropy",
        "grouped_mlp",
        "decode_attention",
        "ssd",
    ],
)
def test_values_in_the_interpreter(group: str) -> None:
    script = Path(__file__).parent / "triton_interpreter.py"
    environment = os.environ | {"TRITON_INTERPRET": "1", "TRITON_DEFAULT_FP_FUSION": "1"}
    run = subprocess.run([sys.executable, str(script), group], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.startswith(group), "the script says how many values it compared"
