"""Every CUDA kernel compiles for every kind of GPU, without one: no spills, and shared memory within the limit."""

import re
from pathlib import Path

import pytest
import torch

from statespan.ops.causal_conv1d import in_block_cuda as conv
from statespan.ops.cuda_kernels import compiler
from statespan.ops.sampling_edge import cuda_backend as edge
from statespan.ops.selective_scan import cuda_plan

ARCHS = ("sm_80", "sm_90", "sm_100", "sm_120")
FOLDER = Path(cuda_plan.__file__).parent
STATIC_BYTES = 48 * 1024  # of shared memory; more has to be asked for when a kernel is launched
SHARED_BYTES = 99 * 1024  # of both kinds together that a block can get on every kind of GPU
SHARED_BYTES_OF = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "sm_120": 99 * 1024}
# The compiler needs more registers on the newest kinds.
SPILL_BYTES = {"forward": 0, "summary": 0, "backward": 0}
SPILL_BYTES_NEWEST = {"forward": 16, "summary": 0, "backward": 0}


def scan(states=16, channels=64, groups=1, dtype=torch.bfloat16, segments=False, gate=True, discretization="mamba"):
    """The work of a scan with such inputs; nothing is run."""
    rows, matrix = (4 * channels, channels, 1), (4 * groups * states, groups * states, states, 1)
    z = dtype if gate else None
    layout = cuda_plan.Layout(
        device=torch.device("cuda", 0),
        size=(1, 4, channels),
        matrix=(groups, states),
        types=(dtype, dtype, z, dtype, dtype),
        strides=(rows, rows, matrix, matrix, *([rows] if gate else [])),
        based=True,
        segments=segments,
        discretization=discretization,
    )
    return cuda_plan.Scan(layout)


CASES = {
    "plain": scan(),
    "segments": scan(segments=True),
    "float32": scan(dtype=torch.float32),
    "float16": scan(dtype=torch.float16, gate=False),
    "odd": scan(states=5, channels=37),
    "zoh": scan(discretization="zoh"),
    "bilinear": scan(discretization="bilinear", segments=True),
    "8 states": scan(states=8),
    "32 states": scan(states=32),
    "64 states": scan(states=64),
    "64 states in float32": scan(states=64, dtype=torch.float32),
    "128 states": scan(states=128),
    "128 states in float32": scan(states=128, dtype=torch.float32),
}
EVERYWHERE = ("plain", "segments", "float32")  # on every kind of GPU; the others on one


def report(kernel: str, arch: str, macros) -> str:
    """Compile, and what the assembler says."""
    log: list[str] = []
    code = compiler.compile_cubin(FOLDER / f"{kernel}.cu", arch, dict(macros), log)
    assert code[:4] == b"\x7fELF"
    return "".join(log)


def check(kernel: str, arch: str, macros, dynamic_bytes: int = 0, limit: int = SHARED_BYTES) -> None:
    text = report(kernel, arch, macros)
    assert "bytes spill stores" in text and "Used" in text
    spills = [int(count) for count in re.findall(r"(\d+) bytes spill stores", text)]
    allowed = SPILL_BYTES_NEWEST if arch in ("sm_100", "sm_120") else SPILL_BYTES
    assert max(spills) <= allowed[kernel], text
    static = max([0, *(int(count) for count in re.findall(r"(\d+) bytes smem", text))])
    assert static <= STATIC_BYTES, text
    assert static + dynamic_bytes <= limit, text


@pytest.mark.parametrize(("case", "arch"), [(c, a) for c in CASES for a in ARCHS if c in EVERYWHERE or a == "sm_90"])
def test_the_scan_compiles(case: str, arch: str) -> None:
    work = CASES[case]
    assert any(work.shared_bytes(form) <= SHARED_BYTES for form in work.forms)
    for form in work.forms if arch == "sm_90" else work.forms[:1]:
        macros, shared_bytes = work.forward_macros(form, keep_starts=True), work.shared_bytes(form)
        check("forward", arch, macros, shared_bytes, SHARED_BYTES_OF[arch])
    if case == "plain":
        form = cuda_plan.FORM_OF_SPLITS
        check("forward", arch, work.forward_macros(form, keep_starts=True), work.shared_bytes(form))
    states = min(8, work.padded // 2)
    check("summary", arch, work.summary_macros(states, REVERSE=0, MM=work.inputs["BM"]))
    check("summary", arch, work.summary_macros(states, REVERSE=1, MM=work.inputs["CM"]))
    _, macros, shared_bytes, _ = work.backward_shape()
    for chained in (0, 1) if case == "plain" else (0,):
        check("backward", arch, (*macros, ("CHAINED", chained)), shared_bytes)
    if work.plain and work.padded == 16:
        check("backward", arch, (*work.backward_shape(keeps_decays=True)[1], ("CHAINED", 0)), shared_bytes)


@pytest.mark.parametrize("size", [9, 50280, 131072, 262144])
@pytest.mark.parametrize("arch", ARCHS)
def test_the_sampling_edge_compiles(arch: str, size: int) -> None:
    macros = edge.macros(size, 1 if arch == "sm_80" else edge.SPLIT)
    if arch == "sm_80" and size > 40000:
        assert macros is None  # a row does not fit in the registers of one block
        return
    assert macros["SPLIT"] * macros["THREADS"] * macros["VALUES"] >= size
    log: list[str] = []
    compiler.compile_cubin(edge.KERNEL.file, arch, macros, log)
    assert "0 bytes spill stores" in "".join(log), log


@pytest.mark.parametrize("room", [SHARED_BYTES, 227 * 1024])
@pytest.mark.parametrize(("channels", "length"), [(64, 100), (1536, 16384), (5120, 2048), (40960, 2048)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_forward_is_planned_within_shared_memory(channels, length, dtype, room, monkeypatch) -> None:
    monkeypatch.setattr(cuda_plan, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(cuda_plan, "shared_memory", lambda device: room)
    work = scan(channels=channels, dtype=dtype)
    work.length = length
    form, split = work.forward_plan()
    assert work.shared_bytes(form) <= room
    assert split % cuda_plan.EVERY == 0 and split >= min(length, 4 * cuda_plan.EVERY)
    if (channels, length, dtype) == (1536, 16384, torch.float32):
        assert split < length  # 96 blocks of 16 channels would leave most threads without work


@pytest.mark.parametrize(
    ("channels", "length", "form"),
    [(1536, 16384, (2, 16)), (5120, 2048, (2, 40)), (8192, 32768, (4, 32)), (40960, 2048, (8, 64))],
)
def test_the_form_that_was_measured_to_be_soonest_done_is_taken(channels, length, form, monkeypatch) -> None:
    """States of a thread and channels of a block on an H100, whose tokens are divided for fewer channels only."""
    monkeypatch.setattr(cuda_plan, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(cuda_plan, "shared_memory", lambda device: 227 * 1024)
    work = scan(channels=channels)
    work.length = length
    assert work.forward_plan()[0][:2] == form
    assert work.forward_plan()[1] == length
    work = scan(channels=768)
    work.length = length
    assert work.forward_plan()[1] < length


def test_rows_that_do_not_begin_at_16_bytes_take_narrow_loads() -> None:
    layout = cuda_plan.Layout(
        device=torch.device("cuda", 0),
        size=(2, 4, 64),
        matrix=(1, 16),
        types=(torch.bfloat16,) * 5,
        strides=((256, 64, 1), (256, 64, 1), (64, 16, 7, 1), (64, 16, 16, 1), (512, 128, 1), (256, 64, 1)),
        based=True,
        segments=False,
    )
    assert cuda_plan.Scan(layout).inputs["ALIGNED"] == 1  # there is one group: its stride means nothing
    for number in range(6):
        strides = [list(x) for x in layout.strides]
        strides[number][1] += 1
        odd = layout._replace(strides=tuple(map(tuple, strides)))
        assert cuda_plan.Scan(odd).inputs["ALIGNED"] == 0
    assert cuda_plan.Scan(layout._replace(based=False)).inputs["ALIGNED"] == 0
    assert cuda_plan.Scan(layout._replace(size=(2, 4, 60))).inputs["ALIGNED"] == 0


def test_every_kernel_file_is_compiled_here() -> None:
    assert {file.stem for file in FOLDER.glob("*.cu")} == set(SPILL_BYTES)
    others = {file.parent.name for file in FOLDER.parent.rglob("*.cu")} - {FOLDER.name}
    assert others == {"decode_step", "sampling_edge", "causal_conv1d"}  # test_decode_kernels.py, and here


def test_a_mistake_in_the_source_is_told(tmp_path: Path) -> None:
    file = tmp_path / "wrong.cu"
    file.write_text('extern "C" __global__ void wrong() { int x = nothing; }\n')
    with pytest.raises(Exception, match='identifier "nothing" is undefined'):
        compiler.compile_cubin(file, "sm_90", {})


def test_machine_code_is_kept_until_the_source_or_a_macro_changes(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    file = tmp_path / "set.cu"
    file.write_text('extern "C" __global__ void set(float* to) { *to = VALUE; }\n')
    first = compiler.cubin(file, "sm_90", {"VALUE": 1})
    assert "compiling" in capsys.readouterr().err
    assert compiler.cubin(file, "sm_90", {"VALUE": 1}) == first
    assert capsys.readouterr().err == ""
    assert compiler.cubin(file, "sm_90", {"VALUE": 2}) != first
    assert len(list((tmp_path / "statespan").glob("*.cubin"))) == 2


def test_headers_are_put_in_their_places() -> None:
    text = compiler.source_of(FOLDER / "forward.cu")
    assert "#include" not in text
    assert all(name in text for name in (": 16) Vector {", "struct Rows {", "scan_forward"))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("inner", "taps"), [(80, 4), (96, 4), (160, 4), (192, 2)])
def test_the_gradients_of_the_conv_compile(inner, taps, arch) -> None:
    log: list[str] = []
    macros = conv.macros_of(256, inner, taps, True, (512, 512))
    compiler.compile_cubin(Path(conv.__file__).parent / "in_block.cu", arch, dict(macros), log)
    spills = max(int(count) for count in re.findall(r"(\d+) bytes spill stores", "".join(log)))
    assert spills <= (96 if arch in ("sm_100", "sm_120") else 0)
    assert max(int(count) for count in re.findall(r"(\d+) bytes smem", "".join(log))) <= STATIC_BYTES
