"""Which backend runs, and what is said where it cannot."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from statespan.errors import BackendUnavailable, UnknownName, UserError
from statespan.ops import causal_conv1d, dispatch, notices, rms_norm
from statespan.ops.cuda_kernels import compiler
from statespan.ops.custom_op import gradients

CPU, META, GPU = torch.device("cpu"), torch.device("meta"), torch.device("cuda:0")


def forget() -> None:
    for function in (dispatch.resolve, dispatch._no_numba, dispatch._no_cuda_core, dispatch._no_triton):
        function.cache_clear()


@pytest.fixture
def packages(monkeypatch):
    """The packages that are installed, to be taken from, on a machine with an H100; nothing was said so far."""
    found = {"numba", "triton", "cuda", "cuda.core"}
    monkeypatch.setattr(dispatch, "find_spec", lambda name: name if name in found else None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    monkeypatch.setattr(compiler, "why_not", lambda capability: None)
    monkeypatch.setattr(notices, "_said", set())
    forget()
    yield found
    forget()


@pytest.fixture
def without_numba(packages):
    packages.remove("numba")


def test_auto_takes_the_first_that_can_run():
    for op, candidates in dispatch.OPS.items():
        here = [name for name in candidates if name not in ("cuda", "triton")]
        assert dispatch.resolve(op, "auto", CPU) == here[0]
        assert dispatch.resolve(op, "auto", META) == next(name for name in here if name != "cpu")


def test_auto_looks_at_the_dtypes():
    assert dispatch.resolve("rms_norm", "auto", CPU, torch.float32, torch.bfloat16) == "cpu"
    assert dispatch.resolve("rms_norm", "auto", CPU, torch.float32, torch.float64) == "reference"
    assert dispatch.resolve("causal_conv1d", "auto", CPU, torch.float16) == "torch"


def test_a_named_backend_runs_or_raises(without_numba):
    assert dispatch.resolve("causal_conv1d", "reference", CPU) == "reference"
    assert dispatch.resolve("causal_conv1d", "auto", CPU) == "torch"
    with pytest.raises(BackendUnavailable, match=r"'cpu' of causal_conv1d cannot run here: numba is not installed"):
        dispatch.resolve("causal_conv1d", "cpu", CPU)


def test_the_reason_names_the_device_or_the_dtype():
    with pytest.raises(BackendUnavailable, match="runs on the CPU only, and the tensors are on meta"):
        dispatch.resolve("rms_norm", "cpu", META)
    with pytest.raises(BackendUnavailable, match="take float32 and bfloat16, and a tensor is float16"):
        dispatch.resolve("rms_norm", "cpu", CPU, torch.float32, torch.float16)


def test_unknown_names():
    with pytest.raises(UnknownName, match="unknown backend of rms_norm: 'refrence'; did you mean 'reference'"):
        dispatch.resolve("rms_norm", "refrence", CPU)
    with pytest.raises(UnknownName, match="unknown backend of rms_norm: 'torch'; known: cpu, reference, triton"):
        dispatch.resolve("rms_norm", "torch", CPU)  # known elsewhere, not to this op


def test_explain_lists_every_backend_of_every_op(without_numba):
    rows = dispatch.explain(CPU)
    assert [(op, name) for op, name, _ in rows] == [
        (op, name) for op, candidates in dispatch.OPS.items() for name in candidates
    ]
    for op in dispatch.OPS:
        assert [state for row_op, _, state in rows if row_op == op].count("runs") == 1
    states = {(op, name): state for op, name, state in rows}
    assert states["causal_conv1d", "cpu"] == "numba is not installed; pip install numba"
    assert states["causal_conv1d", "torch"] == "runs" and states["causal_conv1d", "reference"] == "ready"


def test_every_op_names_known_backends_and_has_one_for_any_device():
    for op, candidates in dispatch.OPS.items():
        assert set(candidates) <= set(dispatch.BACKENDS)
        assert any(name != "cpu" for name in candidates), op


def test_ops_run_where_numba_is_missing(without_numba):
    from statespan.ops import causal_conv1d, linear, rms_norm

    x, weight = torch.randn(1, 3, 4), torch.randn(4, 2)
    assert torch.equal(causal_conv1d(x, weight), causal_conv1d(x, weight, backend="torch"))
    assert torch.equal(rms_norm(x, weight[:, 0], eps=1e-5), rms_norm(x, weight[:, 0], eps=1e-5, backend="reference"))
    assert torch.equal(linear(x, weight.t()), linear(x, weight.t(), backend="torch"))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_gradients_inside_a_kernel(mode):
    """Kernels are called with autograd switched off in one way or another; the reference's gradients come anyway."""
    x, w, upstream = torch.randn(3), torch.randn(3), torch.randn(3)
    with mode():
        found = gradients(lambda x, _, w: (x * w, x.detach()), (x, None, w), (upstream, upstream))
    assert torch.equal(found[0], upstream * w) and found[1] is None and torch.equal(found[2], upstream * x)


def test_sizes_that_a_backend_cannot_take_go_to_the_next_or_are_refused():
    limit = (("cpu", "its kernels hold less"),)
    assert dispatch.resolve("causal_conv1d", "auto", CPU, too_large=limit) == "torch"
    assert dispatch.resolve("causal_conv1d", "torch", CPU, too_large=limit) == "torch"
    with pytest.raises(
        BackendUnavailable, match="backend 'cpu' of causal_conv1d cannot run here: its kernels hold less"
    ):
        dispatch.resolve("causal_conv1d", "cpu", CPU, too_large=limit)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_what_is_no_float_is_refused(backend: str, dtype: torch.dtype):
    """Its results, in the same dtype, would be cut off."""
    x = torch.ones(1, 3, 2).to(dtype)
    with pytest.raises(UserError, match=f"^causal_conv1d: it takes float tensors, and one is {str(dtype)[6:]}$"):
        causal_conv1d(x, torch.ones(2, 4), backend=backend)
    with pytest.raises(UserError, match="rms_norm: it takes float tensors"):
        rms_norm(torch.ones(3, 2), torch.ones(2), eps=1e-5, residual=torch.ones(3, 2).to(dtype), backend=backend)


# What "auto" says where it passes a better backend over.


def line_of(name: str) -> str:
    return f"statespan: selective_scan on cuda:0 runs on its slower backend {name!r}"


def test_what_is_missing_is_told_in_one_line_for_all_ops(packages, capfd):
    packages -= {"triton", "cuda.core"}
    assert dispatch.resolve("selective_scan", "auto", GPU, torch.float32) == "reference"
    said = capfd.readouterr().err
    slower = [op for op, names in dispatch.OPS.items() if {"cuda", "triton"} & set(names)]
    others = f", as {len(slower) - 1} other operations do (statespan backends --device cuda:0)"
    remedies = "'cuda': cuda-core is not installed; pip install 'statespan[cuda]'. 'triton': triton is not installed"
    assert said == f"{line_of('reference')}{others}. {remedies}; pip install triton\n"
    for op in dispatch.OPS:
        dispatch.resolve(op, "auto", GPU, torch.float32)
    assert capfd.readouterr().err == ""


def test_a_cuda_core_that_is_missing_is_told_though_triton_serves(packages, capfd):
    packages.remove("cuda.core")
    for op in dispatch.OPS:
        dispatch.resolve(op, "auto", GPU, torch.bfloat16)
    said = capfd.readouterr().err
    assert said.startswith(line_of("triton")) and said.count("\n") == 1
    assert said.endswith(". 'cuda': cuda-core is not installed; pip install 'statespan[cuda]'\n")


def test_nothing_is_said_where_the_best_runs_or_the_slower_one_was_asked_for(packages, capfd):
    assert dispatch.resolve("selective_scan", "auto", GPU, torch.bfloat16) == "cuda"
    assert dispatch.resolve("linear_cross_entropy", "auto", CPU, torch.float32) == "cpu"
    packages.clear()
    forget()
    assert dispatch.resolve("selective_scan", "auto", GPU, torch.float64) == "reference"
    assert dispatch.resolve("selective_scan", "auto", META, torch.float32) == "reference"
    assert dispatch.resolve("selective_scan", "reference", GPU, torch.float32) == "reference"
    dispatch.explain(GPU)
    assert capfd.readouterr().err == ""


def test_sizes_and_dtypes_and_old_gpus_are_told(packages, monkeypatch, capfd):
    limits = (("cuda", "its kernels hold less"), ("triton", "its kernels hold less"))
    dispatch.resolve("selective_scan", "auto", GPU, torch.float32, too_large=limits)
    assert capfd.readouterr().err.startswith(line_of("reference") + ". 'cuda': its kernels hold less")
    dispatch.resolve("rms_norm", "auto", GPU, torch.float32, torch.float8_e5m2)
    told = "'triton': its kernels take float32, bfloat16 and float16, and a tensor is float8_e5m2"
    assert told in capfd.readouterr().err
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    forget()
    dispatch.resolve("causal_conv1d", "auto", GPU, torch.float32)
    said = capfd.readouterr().err
    assert all(
        f"{name!r}: it needs compute capability 8.0 or above, and Tesla T4 is older" in said
        for name in ("cuda", "triton")
    )
    assert "slower backend 'torch'" in said


def test_on_a_cpu_a_missing_numba_is_told(without_numba, capfd):
    dispatch.resolve("causal_conv1d", "auto", CPU, torch.float32)
    others = sum("cpu" in names for names in dispatch.OPS.values()) - 1
    assert capfd.readouterr().err == (
        f"statespan: causal_conv1d on cpu runs on its slower backend 'torch', as {others} other operations do"
        " (statespan backends --device cpu). 'cpu': numba is not installed; pip install numba\n"
    )
    dispatch.resolve("rms_norm", "auto", CPU, torch.float32)
    assert capfd.readouterr().err == ""
    dispatch.resolve("rms_norm", "auto", CPU, torch.float16)  # another cause
    assert "its kernels take float32 and bfloat16, and a tensor is float16" in capfd.readouterr().err


def test_a_model_without_numba_trains_and_writes_behind_one_notice():
    code = """
import importlib.util, sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("numba", "llvmlite"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hidden())
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "numba" else found(name, *rest)
import statespan, torch
model = statespan.build("jamba-tiny", seed=0)
output = model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]]))
(output.loss + output.aux_loss).backward()
print(len(statespan.generate(model, [[1, 2, 3]], max_new_tokens=3, temperature=0)[0].token_ids))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=False)
    assert run.stdout == "3\n", run.stderr
    assert run.stderr.count("\n") == 1 and run.stderr.endswith("'cpu': numba is not installed; pip install numba\n")


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is published for Linux only")
def test_a_triton_that_cannot_serve_is_told_and_passed_over(packages, monkeypatch, capfd):
    import triton
    import triton.language

    def reason() -> str:
        forget()
        assert dispatch.resolve("rms_norm", "auto", GPU, torch.float32) == "reference"
        notices._said.clear()
        return capfd.readouterr().err

    assert dispatch.resolve("rms_norm", "auto", GPU, torch.float32) == "triton"
    with monkeypatch.context() as patch:
        patch.delattr(triton.language, "static_range")
        assert "has no triton.language.static_range, which the kernels need; pip install 'triton>=" in reason()
    with monkeypatch.context() as patch:
        patch.setattr(triton, "__version__", "3.2.0")
        assert "triton 3.2.0 is too old; pip install 'triton>=3.6" in reason()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "triton.language", None)
        assert "triton does not load (import of triton.language halted" in reason()
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "")
        patch.delenv("CC", raising=False)
        assert "triton needs a C compiler to launch kernels, and there is none; install gcc" in reason()


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is published for Linux only")
def test_what_triton_cannot_compile_is_told_in_a_line():
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from statespan.ops.rms_norm import triton_kernels
    from statespan.ops.triton_kernels import on

    signature = dict.fromkeys(triton_kernels.forward.arg_names[:-2], "*fp32")
    constants = {"ROWS": 3, "BLOCK": 4}  # 3 is no power of two
    source = ASTSource(triton_kernels.forward, {**signature, "ROWS": "constexpr", "BLOCK": "constexpr"}, constants)
    message = r"does not compile .* for cpu: .*power of 2.*backend='ref"
    with pytest.raises(BackendUnavailable, match=message) as raised, on(CPU):
        triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert "\n" not in str(raised.value) and raised.value.__cause__ is not None
    if not torch.cuda.is_available():
        x = torch.ones(2, 4)
        message = r"Triton [\d.]+ does not compile rms_norm.forward for cpu: 0 active"
        with pytest.raises(BackendUnavailable, match=message), on(CPU):
            triton_kernels.forward[(1,)](x, None, x, x, None, 2, 4, 4, 0, 1e-5, ROWS=2, BLOCK=4)
    from_driver: dict = {"__name__": "triton.backends.nvidia.driver"}
    exec("def load(error): raise error", from_driver)
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"), on(CPU):
        from_driver["load"](RuntimeError("Triton Error [CUDA]: out of memory"))
    with pytest.raises(RuntimeError, match="illegal memory access") as raised, on(CPU):
        from_driver["load"](RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"))
    assert raised.type is RuntimeError
    for error in (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("of ours")):
        with pytest.raises(type(error), match=str(error)), on(CPU):
            raise error


def test_a_cuda_core_that_cannot_serve_is_told(monkeypatch):
    monkeypatch.setattr(compiler, "nvrtc_version", lambda: "13.0")
    monkeypatch.setattr(compiler, "_known_architectures", lambda: [80, 90])
    whole = SimpleNamespace(**dict.fromkeys(compiler.NEEDED))
    monkeypatch.setattr(compiler, "cuda_core", lambda: whole)
    assert compiler.why_not((9, 0)) is None
    assert compiler.why_not((12, 1)).startswith("NVRTC 13.0 does not know sm_121, the GPU is newer; pip install")
    monkeypatch.setattr(compiler, "cuda_core", lambda: SimpleNamespace(__version__="0.1.0", launch=None))
    assert compiler.why_not((9, 0)) == (
        "cuda-core 0.1.0 has no cuda.core.Device, it is too old; pip install --upgrade 'statespan[cuda]'"
    )

    def broken():
        raise RuntimeError("libnvrtc.so.13: cannot open\nshared object file")

    monkeypatch.setattr(compiler, "_known_architectures", broken)
    assert compiler.why_not((9, 0)).startswith(
        "cuda-core or NVRTC does not load (libnvrtc.so.13: cannot open); pip install"
    )


@pytest.mark.skipif(sys.platform != "linux", reason="the CUDA compiler is installed on Linux")
def test_what_nvrtc_cannot_compile_is_told_in_a_line(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    (tmp_path / "scan.cu").write_text('extern "C" __global__ void scan() { return missing; }')
    message = rf"NVRTC [\d.]+ does not compile {tmp_path.name}.scan for sm_90: .*; pip install --upgrade 'statespan"
    with pytest.raises(BackendUnavailable, match=message) as raised:
        compiler.cubin(tmp_path / "scan.cu", "sm_90", {})
    assert "\n" not in str(raised.value) and '"missing" is undefined' in str(raised.value)
    assert raised.value.__cause__ is not None
