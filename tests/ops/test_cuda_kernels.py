"""Every CUDA kernel compiles for every kind of GPU, without one: no spills, and shared memory within the limit."""

import re
from pathlib import Path

import pytest
import torch

from statespan.ops.causal_conv1d import cuda_backend as conv
from statespan.ops.cuda_kernels import compiler, marks
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
    if case in ("plain", "8 states"):
        form, _ = cuda_plan.FORMS_OF_SPLITS[work.padded]
        check("forward", arch, work.forward_macros(form, keep_starts=True), work.shared_bytes(form))
    states = min(8, work.padded // 2)
    check("summary", arch, work.summary_macros(states, REVERSE=0, MM=work.inputs["BM"]))
    check("summary", arch, work.summary_macros(states, REVERSE=1, MM=work.inputs["CM"]))
    forms = [cuda_plan.IN_TURN if work.plain and work.padded <= 16 else cuda_plan.IN_TURN._replace(resident=2)]
    forms += [cuda_plan.WITH_DECAYS] if work.plain and work.padded == 16 else []
    for form in forms:
        for chained in (0, 1) if case == "plain" and form == cuda_plan.IN_TURN else (0,):
            check("backward", arch, (*work.backward_macros(form), ("CHAINED", chained)), work.backward_bytes(form))


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


@pytest.mark.parametrize("dtype", marks.SEGMENT)
@pytest.mark.parametrize("arch", ARCHS)
def test_the_tokens_marks_compile(arch: str, dtype: torch.dtype) -> None:
    log: list[str] = []
    compiler.compile_cubin(marks.KERNEL.file, arch, dict(marks.macros(dtype)), log)
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
    ("states", "channels", "length", "form"),
    [
        *(
            (16, 1536, 16384, (2, 12)),
            (16, 2048, 16384, (2, 16)),
            (16, 5120, 2048, (2, 40)),
            (16, 8192, 32768, (4, 32)),
            (16, 40960, 2048, (8, 64)),
        ),
        *((8, 2048, 16384, (1, 16)), (8, 8192, 2048, (4, 32)), (8, 40960, 2048, (4, 64))),
    ],
)
def test_the_form_that_was_measured_to_be_soonest_done_is_taken(states, channels, length, form, monkeypatch) -> None:
    """States of a thread and channels of a block on an H100, whose tokens are divided for fewer channels only."""
    monkeypatch.setattr(cuda_plan, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(cuda_plan, "shared_memory", lambda device: 227 * 1024)
    work = scan(states, channels)
    work.length = length
    assert work.forward_plan()[0][:2] == form
    assert work.forward_plan()[1] == length
    work = scan(states, channels=768)
    work.length = length
    assert work.forward_plan()[1] < length


@pytest.mark.parametrize(
    ("batch", "channels", "length", "hopper", "other"),
    [
        (8, 2048, 2048, ("ROLES", 2048, False), ("WITH_DECAYS", 2048, False)),
        (2, 8192, 8192, ("ROLES", 8192, False), ("WITH_DECAYS", 8192, False)),
        (16, 1536, 2048, ("IN_TURN", 2048, False), ("IN_TURN", 2048, False)),
        (8, 5120, 2048, ("IN_TURN", 256, True), ("IN_TURN", 256, True)),
        (1, 2048, 16384, ("ROLES", 2048, False), ("IN_TURN", 448, False)),
    ],
)
def test_the_backward_is_planned_as_measured(batch, channels, length, hopper, other, monkeypatch) -> None:
    """How a block is made, tokens of a split, and whether splits wait for each other, with 132 multiprocessors."""
    monkeypatch.setattr(cuda_plan, "multiprocessors", lambda device: 132)
    for is_hopper, (form, *expected) in ((True, hopper), (False, other)):
        monkeypatch.setattr(cuda_plan, "hands_over_registers", lambda device, answer=is_hopper: answer)
        work = scan(channels=channels)
        work.length = length
        assert work.backward_plan(batch * channels // 64) == (getattr(cuda_plan, form), *expected)


def test_a_backward_in_roles_compiles_for_what_it_is_loaded_as(monkeypatch) -> None:
    launched = set()
    monkeypatch.setattr(cuda_plan, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(cuda_plan, "hands_over_registers", lambda device: True)
    monkeypatch.setattr(cuda_plan.Kernel, "launch", lambda kernel, *sizes: launched.add((kernel.suffix, sizes[3])))
    work = scan(channels=2048)
    work.batch, work.length = 8, 2048
    work.backward()
    ((suffix, macros),) = launched  # of the main kernel and the sums alike
    assert dict(macros)["ROLES"] == 1
    check("backward", f"sm_90{suffix}", macros, 2 * (work.backward_bytes(cuda_plan.ROLES) + 1024), (227 + 1) * 1024)


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
    # test_decode_kernels.py, and here
    assert others == {"decode_step", "sampling_edge", "causal_conv1d", "cuda_kernels"}


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


CONVOLUTIONS = {
    "plain": {},
    "segments": {"segments": torch.int64, "initial": True},
    "float32": {"dtype": torch.float32, "segments": torch.int32},
    "narrow taps": {"weights": (torch.bfloat16, torch.bfloat16), "segments": torch.int64},
    "narrow bias": {"weights": (torch.float32, torch.float16), "dtype": torch.float16},
    "odd": {"size": (1, 4, 67), "rows": (67, 71, 67), "aligned": False, "biased": False, "silu": False},
    "one tap": {"taps": 1},
    "eight taps": {"taps": 8, "segments": torch.int64},
    "through 80": {"inner": 80},
    "through 96": {"inner": 96, "segments": torch.int64},
    "through 160": {"inner": 160, "initial": True},
    "through 192": {"inner": 192, "taps": 2},
}


@pytest.mark.parametrize(
    ("case", "arch"),
    [(case, arch) for case in CONVOLUTIONS for arch in (ARCHS if case in ("plain", "through 96") else ["sm_90"])],
)
def test_the_conv_compiles(case, arch) -> None:
    plain = {
        **{"device": torch.device("cuda", 0), "size": (1, 4, 256), "dtype": torch.bfloat16, "taps": 4, "inner": 0},
        **{"rows": (512, 256, 512), "biased": True, "silu": True, "segments": None, "initial": False, "aligned": True},
    }
    backward = conv.Layout(**{**plain, **CONVOLUTIONS[case]})
    log: list[str] = []
    folder = Path(conv.__file__).parent
    compiler.compile_cubin(folder / "backward.cu", arch, dict(backward.macros), log)
    if backward.inner == 0:
        forward = backward._replace(rows=backward.rows[:1])
        compiler.compile_cubin(folder / "forward.cu", arch, dict(forward.macros), log)
    spills = max(int(count) for count in re.findall(r"(\d+) bytes spill stores", "".join(log)))
    assert spills <= (96 if arch in ("sm_100", "sm_120") else 0)
    assert max(int(count) for count in re.findall(r"(\d+) bytes smem", "".join(log))) <= STATIC_BYTES
