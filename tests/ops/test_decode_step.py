"""Prepared decoding steps against the same half of a block in float64."""

import copy
import sys
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from statespan.errors import UserError
from statespan.layers.config import Mamba1Config, Mamba2Config, MLPConfig, MoEConfig
from statespan.layers.linear import Int8Linear, Linear
from statespan.layers.mamba1 import Mamba1
from statespan.layers.mamba2 import Mamba2
from statespan.layers.mlp import MLP
from statespan.layers.moe import Experts, Int8Experts, MoE
from statespan.layers.norm import RMSNorm
from statespan.layers.state import SSMState
from statespan.ops.decode_step import HeadWeights, Projection, prepare, prepare_verify, update
from statespan.ops.decode_step.multiply import Multiply
from statespan.ops.decode_step.project import Convolved, Gated, Normed
from statespan.ops.decode_step.stack import mamba1_stack
from statespan.ops.decode_step.stream import Stream
from statespan.ops.decode_step.tokens import choose_best, embedder

BACKENDS = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]  # conftest.py makes the latter's tensors there
LIMIT = {"float32": 3e-6, "int8": 3e-6, "bfloat16": 2**-8}  # of the largest value; bfloat16 rounds what comes out
KINDS = ("float32", "bfloat16", "int8")
HIDDEN = 48  # a multiple of what 16 bytes hold, also of int8
MAMBA1 = {
    "plain": Mamba1Config(state_size=16),
    "odd": Mamba1Config(state_size=5, conv_kernel=3, dt_rank=3, proj_bias=True, conv_bias=False),
    "inner norms": Mamba1Config(state_size=8, inner_norms=True, dt_rank=20),
    "one tap, zoh": Mamba1Config(state_size=33, conv_kernel=1, discretization="zoh"),
    "bilinear, many channels": Mamba1Config(expand=6, discretization="bilinear", inner_norms=True),
}
MATRIX = {  # by the width of the residual stream
    128: {"dt_rank": 8},
    96: {"inner_norms": True, "dt_rank": 40, "proj_bias": True},
    640: {"conv_bias": False, "discretization": "zoh", "dt_rank": 64},
    32: {"conv_kernel": 2, "dt_rank": 16, "discretization": "bilinear"},
}
MAMBA2 = {
    "plain": Mamba2Config(state_size=16, head_dim=8),
    "groups": Mamba2Config(state_size=7, head_dim=4, num_groups=3, proj_bias=True, norm_before_gate=True),
    "norm groups, odd head": Mamba2Config(state_size=5, head_dim=3, num_groups=2, norm_groups=8, conv_bias=False),
    "gate alone, dt limit": Mamba2Config(state_size=16, head_dim=16, gated_norm=False, dt_limit=(0.01, 0.02)),
    "bilinear": Mamba2Config(state_size=20, head_dim=8, discretization="bilinear", conv_kernel=2),
}
FEED_FORWARD = {
    "swiglu": MLPConfig(intermediate_size=48),
    "relu, bias": MLPConfig(intermediate_size=48, activation="relu", bias=True),
    "silu": MLPConfig(intermediate_size=16, activation="silu"),
    "experts": MoEConfig(num_experts=5, top_k=2, intermediate_size=80),
    "renormalised": MoEConfig(num_experts=8, top_k=3, intermediate_size=16, renormalize=True, bias=True),
    "sigmoid": MoEConfig(
        num_experts=4, top_k=1, intermediate_size=32, score_function="sigmoid", router_bias=True, activation="relu"
    ),
}


def randomized(module: nn.Module) -> nn.Module:
    """Every parameter with values that matter: no zeros of biases, no ones of norms."""
    for name, parameter in module.named_parameters():
        with torch.no_grad():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 1.0))
            if name.endswith("A_log"):
                parameter.copy_(torch.rand_like(parameter) * 2)
    return module


def in_kind(module: nn.Module, kind: str) -> nn.Module:
    """The module in a number format. Nothing is quantised twice, so `exact` can undo it."""
    if kind == "float32":
        return module
    module = module.to(torch.bfloat16)
    if kind == "int8":
        for parent in list(module.modules()):
            for name, child in parent.named_children():
                if isinstance(child, Linear):
                    setattr(parent, name, Int8Linear(child.weight, child.bias))
                elif isinstance(child, Experts):
                    setattr(parent, name, Int8Experts(child))
    return module


def exact(module: nn.Module) -> nn.Module:
    """The same numbers in float64, int8 weights multiplied out."""
    module = copy.deepcopy(module)
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, Int8Linear):
                linear = Linear(child.in_features, child.out_features, bias=child.bias is not None)
                linear.weight = nn.Parameter(child.weight.double() * child.scale.double()[:, None])
                if child.bias is not None:
                    linear.bias = nn.Parameter(child.bias.double())
                setattr(parent, name, linear)
            elif isinstance(child, Int8Experts):
                for part in ("up", "down"):
                    weight, scale = getattr(child, f"{part}_proj"), getattr(child, f"{part}_scale")
                    setattr(child, f"{part}_proj", weight.double() * scale.double()[..., None])
                    bias = getattr(child, f"{part}_proj_bias")
                    setattr(child, f"{part}_proj_bias", None if bias is None else bias.double())
                    setattr(child, f"{part}_scale", None)
    return module.double()


def error(value: torch.Tensor, truth: torch.Tensor) -> float:
    return ((value.double() - truth).abs().max() / truth.abs().max()).item()


def built(layer: nn.Module, kind: str) -> tuple[nn.Module, RMSNorm]:
    pair = nn.ModuleList([layer, RMSNorm(HIDDEN, 1e-5)])
    layer, norm = in_kind(randomized(pair), kind).requires_grad_(False).eval()
    assert isinstance(norm, RMSNorm)
    return layer, norm


def check_mixer(layer, norm, rows, kind, stream=None):
    dtype = norm.weight.dtype
    stream = stream or dtype
    hidden = torch.randn(rows, HIDDEN).to(stream)
    empty = layer.new_state(rows, norm.weight.device, dtype)
    state = SSMState(torch.randn(empty.conv.shape).to(dtype), torch.randn(empty.ssm.shape))
    step = prepare(layer.step_weights(norm), rows, stream, dtype)
    assert step is not None
    layer64, norm64 = exact(layer), exact(norm)
    for _ in range(2):  # scratch memory of the first call is in the second's way, if anywhere
        mixed, after = layer64(norm64(hidden.double()[:, None]), SSMState(state.conv.double(), state.ssm.double()))
        truth = hidden.double() + mixed[:, 0]
        hidden, conv, ssm = step(hidden, state.conv, state.ssm)
        assert error(hidden, truth) < LIMIT[kind if stream == dtype else "float32"]
        assert conv.numel() == 0 or error(conv, after.conv) < LIMIT["bfloat16" if kind == "int8" else kind]
        assert error(ssm, after.ssm) < LIMIT["float32"]
        state = SSMState(conv, ssm)


def bfloat16_limits(kind: str) -> str:
    return "bfloat16" if kind != "float32" else kind


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MAMBA1)
@pytest.mark.parametrize("backend", BACKENDS)
def test_mamba1_equals_float64(name, kind, rows, backend):
    torch.manual_seed(0)
    layer, norm = built(Mamba1(HIDDEN, MAMBA1[name]), kind)
    check_mixer(layer, norm, rows, bfloat16_limits(kind))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MAMBA2)
@pytest.mark.parametrize("backend", BACKENDS)
def test_mamba2_equals_float64(name, kind, rows, backend):
    torch.manual_seed(1)
    layer, norm = built(Mamba2(HIDDEN, MAMBA2[name]), kind)
    check_mixer(layer, norm, rows, bfloat16_limits(kind))


@pytest.mark.parametrize("rows", [1, 4, 8])
@pytest.mark.parametrize("backend", BACKENDS)
def test_more_rows(rows, backend):
    torch.manual_seed(2)
    check_mixer(*built(Mamba1(HIDDEN, MAMBA1["inner norms"]), "float32"), rows, "float32")
    check_mixer(*built(Mamba2(HIDDEN, MAMBA2["groups"]), "float32"), rows, "float32")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_float32_residual_stream_is_not_rounded(backend):
    torch.manual_seed(3)
    check_mixer(*built(Mamba1(HIDDEN, MAMBA1["plain"]), "bfloat16"), 2, "bfloat16", stream=torch.float32)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FEED_FORWARD)
@pytest.mark.parametrize("backend", BACKENDS)
def test_feed_forward_equals_float64(name, kind, rows, backend):
    torch.manual_seed(4)
    config = FEED_FORWARD[name]
    layer, norm = built((MLP if isinstance(config, MLPConfig) else MoE)(HIDDEN, config), kind)
    hidden = torch.randn(rows, HIDDEN).to(norm.weight.dtype)
    step = prepare(layer.step_weights(norm), rows, hidden.dtype, hidden.dtype)
    assert step is not None
    layer64, norm64 = exact(layer), exact(norm)
    truth = hidden.double() + layer64(norm64(hidden.double()[:, None]))[0][:, 0]
    first = step(hidden.clone())
    assert error(first, truth) < LIMIT[bfloat16_limits(kind)]
    assert torch.equal(first, step(hidden.clone()))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_are_no_multiple_of_16_bytes(backend, kind, rows):
    """A GPU leaves these to products that round what they pass on: hardly more than the layer's own forward."""
    torch.manual_seed(8)
    layer, norm = built(MLP(HIDDEN, MLPConfig(intermediate_size=40)), kind)
    hidden = torch.randn(rows, HIDDEN).to(norm.weight.dtype)
    step = prepare(layer.step_weights(norm), rows, hidden.dtype, hidden.dtype)
    assert step is not None
    truth = hidden.double() + exact(layer)(exact(norm)(hidden.double()[:, None]))[0][:, 0]
    plain = hidden + layer(norm(hidden[:, None]))[0][:, 0]
    assert (step(hidden.clone()).double() - truth).norm() <= 2 * (plain.double() - truth).norm()


def check_many(layer, norm, rows, stream):
    """What passes between the parts is rounded here too: hardly more than in the layer's own forward."""
    dtype = norm.weight.dtype
    hidden, empty = torch.randn(rows, HIDDEN).to(stream), layer.new_state(rows, norm.weight.device, dtype)
    state = SSMState(torch.randn(empty.conv.shape).to(dtype), torch.randn(empty.ssm.shape))
    exact_state = SSMState(state.conv.double(), state.ssm.double())
    mixed, after = exact(layer)(exact(norm)(hidden.double()[:, None]), exact_state)
    truth = hidden.double() + mixed[:, 0]
    plain, plain_after = layer(norm(hidden[:, None]), state)
    step = prepare(layer.step_weights(norm), rows, stream, dtype)
    assert step is not None
    found = step(hidden.clone(), state.conv.clone(), state.ssm.clone())
    wanted = (hidden + plain[:, 0], plain_after.conv, plain_after.ssm)
    for ours, theirs, value in zip(found, wanted, (truth, after.conv, after.ssm), strict=True):
        distance, plain_distance = ((x.double() - value).norm() for x in (ours, theirs))
        assert distance <= max(2 * plain_distance, 3e-6 * value.norm())


@pytest.mark.skipif("cuda" not in BACKENDS, reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [9, 20])
@pytest.mark.parametrize("backend", ["cuda"])
def test_many_rows_on_a_gpu(kind, rows, backend):
    torch.manual_seed(6)
    for config in MAMBA1.values():
        layer, norm = built(Mamba1(HIDDEN, config), kind)
        check_many(layer, norm, rows, norm.weight.dtype)
        check_many(layer, norm, rows, torch.float32)
    for config in MAMBA2.values():
        check_many(*built(Mamba2(HIDDEN, config), kind), rows, torch.float32)


@pytest.mark.skipif("cuda" not in BACKENDS, reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [9, 64, 65, 128])
@pytest.mark.parametrize("backend", ["cuda"])
def test_matrix_units_on_a_gpu(dtype, rows, backend, monkeypatch):
    """Widths that they take, unlike those above."""
    torch.manual_seed(7)
    for hidden, changes in MATRIX.items():
        monkeypatch.setattr(sys.modules[__name__], "HIDDEN", hidden)
        layer, norm = (x.to(dtype) for x in built(Mamba1(hidden, Mamba1Config(**changes)), "bfloat16"))
        for projection in (layer.in_proj, layer.x_proj, layer.out_proj):
            projection.weight.mul_(0.2)  # float16 ends at 65,504
        check_many(layer, norm, rows, dtype)
        check_many(layer, norm, rows, torch.float32)


@pytest.mark.skipif("cuda" not in BACKENDS, reason="needs a GPU")
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("width", [160, 768, 2560, 4352])
@pytest.mark.parametrize("backend", ["cuda"])
def test_the_head_on_a_gpu(width, rows, backend):
    """Every plan of the division of the work: rows that share a warp, warps that share a row, several rounds."""
    hidden, norm = torch.randn(rows, width), torch.rand(width) + 0.5
    for outputs in (5, 333, 9001):
        weight = torch.randn(outputs + 3, width).bfloat16()
        head = prepare(HeadWeights(norm, 1e-5, Projection(weight), outputs), rows, torch.float32, torch.bfloat16)
        wide = hidden.double()
        normed = wide * (wide.square().mean(1, keepdim=True) + 1e-5).rsqrt() * norm.double()
        assert error(head(hidden), normed @ weight[:outputs].double().t()) < 3e-6


@pytest.mark.skipif("cuda" not in BACKENDS, reason="needs a GPU")
@pytest.mark.parametrize("rows", [9, 64, 65, 130])
@pytest.mark.parametrize("backend", ["cuda"])
def test_logits_of_many_rows_are_not_rounded(rows, backend):
    """Two tokens whose logits round to the same 16 bits are no tie."""
    hidden, norm, weight = torch.randn(rows, 768), torch.rand(768) + 0.5, torch.randn(1000, 768).bfloat16()
    head = prepare(HeadWeights(norm.bfloat16(), 1e-5, Projection(weight), 997), rows, torch.float32, torch.bfloat16)
    logits, wide = head(hidden), hidden.double()
    normed = wide * (wide.square().mean(1, keepdim=True) + 1e-5).rsqrt() * norm.bfloat16().double()
    assert logits.dtype == torch.float32 and not torch.equal(logits, logits.bfloat16().float())
    assert error(logits, normed @ weight[:997].double().t()) < LIMIT["bfloat16"]


@pytest.mark.skipif("cuda" not in BACKENDS, reason="needs a GPU")
@pytest.mark.parametrize("rows", [9, 64, 65, 130])
@pytest.mark.parametrize(("outputs", "inputs"), [(192, 5120), (80, 1536), (101, 136), (5, 64), (2000, 640)])
@pytest.mark.parametrize("backend", ["cuda"])
def test_products_on_matrix_units(outputs, inputs, rows, backend):
    """Blocks that share the inputs, rows in several blocks, a ring that holds all and one that does not."""
    for dtype in (torch.bfloat16, torch.float16):
        weight, x = torch.randn(outputs, inputs).to(dtype), torch.randn(rows, inputs + 8).to(dtype)[:, :inputs]
        truth = x.double() @ weight.double().t()
        first = Multiply(Projection(weight), rows)(x)
        assert error(first, truth) < 3e-6
        assert torch.equal(first, Multiply(Projection(weight), rows)(x))
        assert error(Multiply(Projection(weight), rows, outputs=outputs - 3)(x), truth[:, :-3]) < 3e-6


STACKS = {  # by the width of the residual stream
    512: {"dt_rank": 24},
    768: {"conv_bias": False, "conv_kernel": 2, "discretization": "zoh"},
    1536: {"dt_rank": 8, "discretization": "bilinear"},
    2560: {},
}


@pytest.mark.skipif("cuda" not in BACKENDS, reason="needs a GPU")
@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", STACKS)
@pytest.mark.parametrize("backend", ["cuda"])
def test_a_stack_on_a_gpu(width, stream, backend, monkeypatch):
    """Three tokens through three blocks; the second and the third meet what the one before left in scratch memory."""
    monkeypatch.setattr(sys.modules[__name__], "HIDDEN", width)
    torch.manual_seed(9)
    pairs = [built(Mamba1(width, Mamba1Config(**STACKS[width])), "bfloat16") for _ in range(3)]
    for layer, _ in pairs:
        for projection in (layer.in_proj, layer.x_proj, layer.out_proj):
            projection.weight.mul_(0.1)
    states = [layer.new_state(1, norm.weight.device, torch.bfloat16) for layer, norm in pairs]
    weights = [layer.step_weights(norm) for layer, norm in pairs]
    step = mamba1_stack(weights, [(state.conv, state.ssm) for state in states], stream)
    assert step is not None
    for _ in range(3):
        hidden = torch.randn(1, width).to(stream)
        truth, after = hidden.double(), []
        for (layer, norm), state in zip(pairs, states, strict=True):
            exact_state = SSMState(state.conv.double(), state.ssm.double())
            mixed, state = exact(layer)(exact(norm)(truth[:, None]), exact_state)
            truth = truth + mixed[:, 0]
            after.append(state)
        assert error(step(hidden), truth) < (LIMIT["float32"] if stream == torch.float32 else 3 * LIMIT["bfloat16"])
        for state, expected in zip(states, after, strict=True):
            # A rounded stream is what the next block reads.
            assert error(state.conv, expected.conv) < (1 if stream == torch.float32 else 3) * LIMIT["bfloat16"]
            assert error(state.ssm, expected.ssm) < (LIMIT["float32"] if stream == torch.float32 else 2**-7)


@pytest.mark.skipif("cuda" not in BACKENDS, reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [9, 64, 65, 130])
@pytest.mark.parametrize("crowded", [False, True], ids=["", "crowded"])
@pytest.mark.parametrize("backend", ["cuda"])
def test_a_stack_of_many_rows_on_a_gpu(dtype, rows, crowded, backend, monkeypatch):
    """Two tokens through two blocks: hardly further from float64 than the layers' own forward."""
    torch.manual_seed(10)
    for width, changes in {128: MATRIX[128], 640: MATRIX[640], 192: {"inner_norms": True, "dt_rank": 40}}.items():
        monkeypatch.setattr(sys.modules[__name__], "HIDDEN", width)
        if crowded:  # a block of the recurrence takes two groups of rows, for all to run at once
            fewest = -(-rows // 16) * 2 * width // 64
            monkeypatch.setattr(update, "multiprocessors", lambda device, fewest=fewest: -(-fewest // 3))
        config = Mamba1Config(**changes)
        pairs = [tuple(x.to(dtype) for x in built(Mamba1(width, config), "bfloat16")) for _ in range(2)]
        for layer, _ in pairs:
            for projection in (layer.in_proj, layer.x_proj, layer.out_proj):
                projection.weight.mul_(0.1)
        for stream in (dtype, torch.float32):
            ours = [layer.new_state(rows, norm.weight.device, dtype) for layer, norm in pairs]
            plain = [layer.new_state(rows, norm.weight.device, dtype) for layer, norm in pairs]
            truth = [SSMState(state.conv.double(), state.ssm.double()) for state in ours]
            weights = [layer.step_weights(norm) for layer, norm in pairs]
            step = mamba1_stack(weights, [(state.conv, state.ssm) for state in ours], stream)
            assert step is not None
            for _ in range(2):
                hidden = torch.randn(rows, width).to(stream)
                values = [step(hidden.clone()), hidden, hidden.double()]
                for i, (layer, norm) in enumerate(pairs):
                    mixed, plain[i] = layer(norm(values[1][:, None]), plain[i])
                    values[1] = values[1] + mixed[:, 0]
                    mixed, truth[i] = exact(layer)(exact(norm)(values[2][:, None]), truth[i])
                    values[2] = values[2] + mixed[:, 0]
                distance, plain_distance = ((value.double() - values[2]).norm() for value in values[:2])
                assert distance <= 2 * plain_distance
            for mine, theirs, exactly in zip(ours, plain, truth, strict=True):
                for name in ("conv", "ssm"):
                    states = [getattr(state, name).double() for state in (mine, theirs, exactly)]
                    assert (states[0] - states[2]).norm() <= max(2 * (states[1] - states[2]).norm(), 3e-6)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("tokens", [7, 1001, 50277])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_best_token(backend, tokens, rows):
    """The first of equal ones; a NaN is larger than all, and a row of minus infinities has a first one too."""
    logits = torch.randn(rows, tokens + 3)[:, :tokens]
    logits[0, [2, 5]] = 99.0
    if rows > 1:
        logits[1, 3], logits[2], logits[3] = torch.nan, -float("inf"), -logits[3].abs() - 1
        logits[4, 1:] = -0.0
        logits[4, 0] = 0.0
    ids, best = torch.full((rows,), -1), torch.zeros(rows)
    choose_best(logits, ids, best)
    truth = torch.tensor([row.index(max(row, key=lambda x: (x != x, x))) for row in logits.tolist()])
    assert torch.equal(ids, truth)
    torch.testing.assert_close(best, logits.gather(1, truth[:, None])[:, 0], rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif("cuda" not in BACKENDS, reason="needs a GPU")
@pytest.mark.parametrize("backend", ["cuda"])
def test_a_thread_whose_first_call_is_a_step(backend):
    """PyTorch gives a thread the device's context when it calls the driver itself, and not before."""
    layer, norm = built(Mamba2(HIDDEN, MAMBA2["plain"]), "bfloat16")
    hidden, state = torch.randn(2, HIDDEN), layer.new_state(2, norm.weight.device, torch.bfloat16)
    step, found = prepare(layer.step_weights(norm), 2, torch.float32, torch.bfloat16), []
    assert step is not None
    expected = step(hidden.clone(), state.conv.clone(), state.ssm.clone())
    arguments = hidden.clone(), state.conv.clone(), state.ssm.clone()
    torch.cuda.synchronize()
    thread = threading.Thread(target=lambda: found.append(step(*arguments)))
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert found and all(map(torch.equal, found[0], expected))


@pytest.mark.skipif("cuda" not in BACKENDS, reason="needs a GPU")
@pytest.mark.parametrize("backend", ["cuda"])
def test_the_embedding_on_a_gpu(backend):
    table, ids = torch.randn(99, 1100).bfloat16(), torch.tensor([0, 98, 5])
    assert torch.equal(embedder(table, 3, torch.float32)(ids), table[ids].float())
    columns = torch.stack([ids, ids + 1], dim=1)
    assert torch.equal(embedder(table, 3, torch.float32)(columns[:, 0]), table[ids].float())
    assert torch.equal(embedder(table, 3, torch.bfloat16)(ids), table[ids])


def test_the_cpu_leaves_states_as_they_are():
    layer, norm = built(Mamba1(HIDDEN, MAMBA1["plain"]), "float32")
    step = prepare(layer.step_weights(norm), 2, torch.float32, torch.float32)
    state = layer.new_state(2, torch.device("cpu"), torch.float32)
    before = state.clone()
    step(torch.randn(2, HIDDEN), state.conv, state.ssm)
    assert torch.equal(state.conv, before.conv) and torch.equal(state.ssm, before.ssm)


def test_two_threads_and_one_agree():
    torch.manual_seed(5)
    layer = randomized(Mamba1(512, Mamba1Config(inner_norms=True))).requires_grad_(False)
    norm = RMSNorm(512, 1e-5)
    hidden, state = torch.randn(2, 512), layer.new_state(2, torch.device("cpu"), torch.float32)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        step = prepare(layer.step_weights(norm), 2, torch.float32, torch.float32)
        assert step is not None
        results.append([step(hidden, state.conv, state.ssm) for _ in range(20)])
    torch.set_num_threads(1)
    for one, two in zip(results[0], results[1], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_no_step_where_the_kernels_cannot_run():
    norm = RMSNorm(HIDDEN, 1e-5)
    mixer, mlp = Mamba1(HIDDEN, MAMBA1["plain"]), MLP(HIDDEN, MLPConfig(intermediate_size=8, activation="gelu"))
    assert prepare(mixer.step_weights(norm), 9, torch.float32, torch.float32) is None  # many rows
    assert prepare(mlp.step_weights(norm), 1, torch.float32, torch.float32) is None  # the exact GELU
    double = copy.deepcopy(mixer).double()
    assert prepare(double.step_weights(norm), 1, torch.float64, torch.float64) is None
    mixed = copy.deepcopy(mixer)
    mixed.in_proj.to(torch.bfloat16)
    assert prepare(mixed.step_weights(norm), 1, torch.float32, torch.float32) is None


@pytest.mark.parametrize("change", ["rows", "dtype", "conv dtype", "state of another"])
def test_what_does_not_fit_is_refused_before_a_kernel_writes(change: str) -> None:
    layer, norm = built(Mamba1(HIDDEN, MAMBA1["plain"]), "bfloat16")
    step = prepare(layer.step_weights(norm), 2, torch.float32, torch.bfloat16)
    hidden, state = torch.randn(2, HIDDEN), layer.new_state(2, torch.device("cpu"), torch.bfloat16)
    conv, ssm = state.conv, state.ssm
    match change:
        case "rows":
            hidden = torch.randn(3, HIDDEN)
        case "dtype":
            hidden = hidden.bfloat16()
        case "conv dtype":
            conv = conv.float()
        case _:
            ssm = ssm[:, :, :-1]
    with pytest.raises(UserError, match=r"decoding step: .* must be"):
        step(hidden, conv, ssm)
    mlp = MLP(HIDDEN, MLPConfig(intermediate_size=8)).requires_grad_(False)
    with pytest.raises(UserError, match="hidden must be"):
        prepare(mlp.step_weights(RMSNorm(HIDDEN, 1e-5)), 2, torch.float32, torch.float32)(hidden[:, :3])


STREAMED = {
    "norm": {"before": "norm"},
    "norm, conv": {"before": "norm", "after": "conv"},
    "added": {"add": True},
    "gate, added": {"before": "gate", "add": True},
    "norm of a gate": {"before": "gate norm", "add": True},
    "norm, then gate": {"before": "norm gate"},
    "norm, swiglu, bias": {"before": "norm", "after": "swiglu", "bias": True},
    "gelu": {"after": "gelu"},
}


@pytest.mark.skipif("cuda" not in BACKENDS, reason="needs a GPU")
@pytest.mark.parametrize("rows", [2, 5, 8])
@pytest.mark.parametrize("shape", [(1040, 72), (338, 1536), (96, 2080)])
@pytest.mark.parametrize("name", STREAMED)
@pytest.mark.parametrize("backend", ["cuda"])
def test_a_product_of_few_rows_on_a_gpu(backend, name, shape, rows):
    """On matrix units, x in two parts: what is before and behind the product, against float64."""
    torch.manual_seed(9)
    (outputs, inputs), form = shape, STREAMED[name]
    dtype = torch.float16 if rows == 5 else torch.bfloat16
    weight, norm = torch.randn(outputs, inputs).to(dtype) / inputs**0.5, torch.randn(inputs).to(dtype)
    bias = torch.randn(outputs).to(dtype) if form.get("bias") else None
    x, z, old = torch.randn(rows, inputs), torch.randn(rows, inputs), torch.randn(rows, outputs)
    taps, offset, window = torch.randn(outputs - 32, 4).to(dtype), torch.randn(outputs - 32).to(dtype), None
    before, after, wide = None, form.get("after"), x.double()
    normed = lambda x: x / (x.square().mean(1, keepdim=True) + 1e-5).sqrt() * norm.double()  # noqa: E731  # twice
    gate = F.silu(z.double())
    match form.get("before"):
        case "norm":
            before, wide = Normed(norm, 1e-5), normed(wide)
        case "gate":
            before, wide = Gated(None, 1e-5, inputs, norm_first=False), wide * gate
        case "gate norm":
            before, wide = Gated(norm, 1e-5, inputs, norm_first=False), normed(wide * gate)
        case "norm gate":
            before, wide = Gated(norm, 1e-5, inputs, norm_first=True), normed(wide) * gate
    truth = wide @ weight.double().T + (0 if bias is None else bias.double())
    if after == "conv":
        window = torch.randn(rows, 3, outputs - 32).to(dtype)
        after, part = Convolved(16, taps, offset, dtype), truth[:, 16 : outputs - 16]
        wanted = torch.cat([window.double(), part[:, None]], 1)
        truth[:, 16 : outputs - 16] = F.silu((wanted * taps.double().T).sum(1) + offset.double())
    elif after == "swiglu":
        truth = F.silu(truth[:, : outputs // 2]) * truth[:, outputs // 2 :]
    elif after == "gelu":
        truth = F.gelu(truth)
    y = old[:, : truth.shape[1]].clone() if form.get("add") else torch.full(truth.shape, torch.nan)
    truth = truth + y.double() if form.get("add") else truth
    product = Stream(
        Projection(weight, bias=bias), rows, torch.float32, before=before, after=after, add=bool(form.get("add"))
    )
    product(x, y, z=z, conv_state=window)
    assert error(y, truth) < 1e-5
    if window is not None:
        assert error(window, wanted[:, 1:]) < LIMIT["bfloat16"]


def stepped(layer, norm, hidden, state, windows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The layer's own forward, token by token: the stream [b t h], and windows and states after each token [t b ..].

    Each token finds the window in `windows` [t b ..], which is rounded to the weights' dtype.
    """
    outputs, seen, states = [], [], []
    for token, window in zip(hidden.unbind(1), windows, strict=True):
        mixed, state = layer(norm(token[:, None]), state)
        outputs.append(token + mixed[:, 0])
        seen.append(state.conv)
        states.append(state.ssm)
        state = SSMState(window.to(state.conv.dtype), state.ssm)
    return torch.stack(outputs, 1), torch.stack(seen), torch.stack(states)


def check_verify(layer, norm, rows: int, count: int, kind: str, stream: torch.dtype) -> None:
    dtype, width = norm.weight.dtype, norm.weight.shape[0]
    hidden, empty = torch.randn(rows, count, width).to(stream), layer.new_state(rows, norm.weight.device, dtype)
    state = SSMState(torch.randn(empty.conv.shape).to(dtype), torch.randn(empty.ssm.shape))
    step = prepare_verify(layer.step_weights(norm), rows, count, stream, dtype)
    assert step is not None
    before = state.clone()
    after = layer.new_state(rows * count, norm.weight.device, dtype).map(lambda tensor: tensor.fill_(torch.nan))
    found = step(hidden.flatten(0, 1).clone(), state.conv, state.ssm, after.conv, after.ssm)
    assert torch.equal(before.conv, state.conv) and torch.equal(before.ssm, state.ssm)
    ours = (found.view(rows, count, -1), after.conv.unflatten(0, (count, rows)), after.ssm.unflatten(0, (count, rows)))
    double = SSMState(state.conv.double(), state.ssm.double())
    truth = stepped(exact(layer), exact(norm), hidden.double(), double, ours[1])
    if rows * count <= 8:  # next to nothing is rounded between the parts
        limits = (LIMIT[kind if stream == dtype else "float32"], LIMIT[kind], LIMIT["float32"])
        for value, wanted, limit in zip(ours, truth, limits, strict=True):
            assert value.numel() == 0 or error(value, wanted) < limit * count
        return
    plain = stepped(layer, norm, hidden, state, ours[1])
    for value, theirs, wanted in zip(ours, plain, truth, strict=True):
        distance, plain_distance = ((x.double() - wanted).norm() for x in (value, theirs))
        assert distance <= max(2 * plain_distance, 3e-6 * wanted.norm())


@pytest.mark.skipif("cuda" not in BACKENDS, reason="needs a GPU")
@pytest.mark.parametrize("shape", [(1, 5), (2, 4), (3, 5), (2, 16)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["cuda"])
def test_several_tokens_equal_float64(backend: str, kind: str, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    for make, configs in ((Mamba1, MAMBA1), (Mamba2, MAMBA2)):
        for config in configs.values():
            layer, norm = built(make(HIDDEN, config), kind)
            check_verify(layer, norm, *shape, bfloat16_limits(kind), torch.float32)
            if kind == "bfloat16":
                check_verify(layer, norm, *shape, kind, torch.bfloat16)


@pytest.mark.skipif("cuda" not in BACKENDS, reason="needs a GPU")
@pytest.mark.parametrize("shape", [(1, 6), (4, 5), (16, 5)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["cuda"])
def test_several_tokens_on_matrix_units(
    backend: str, dtype: torch.dtype, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    for width, changes in MATRIX.items():
        monkeypatch.setattr(sys.modules[__name__], "HIDDEN", width)
        layer, norm = (x.to(dtype) for x in built(Mamba1(width, Mamba1Config(**changes)), "bfloat16"))
        for projection in (layer.in_proj, layer.x_proj, layer.out_proj):
            projection.weight.mul_(0.2)  # float16 ends at 65,504
        check_verify(layer, norm, *shape, "bfloat16", torch.float32)


def test_several_tokens_take_a_gpu() -> None:
    layer, norm = Mamba1(48, MAMBA1["plain"]), RMSNorm(48, 1e-5)
    assert prepare_verify(layer.step_weights(norm), 1, 4, torch.float32, torch.float32) is None
