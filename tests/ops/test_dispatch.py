"""Which backend runs, and what is said where it cannot."""

import pytest
import torch

from statespan.errors import BackendUnavailable, UnknownName
from statespan.ops import dispatch
from statespan.ops.custom_op import gradients

CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.fixture
def without_numba(monkeypatch):
    monkeypatch.setattr(dispatch, "_why_not_numba", lambda: "numba is not installed; pip install numba")
    dispatch.resolve.cache_clear()
    yield
    dispatch.resolve.cache_clear()


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
