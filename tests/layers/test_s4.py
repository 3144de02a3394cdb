"""S4, S4D and LSSL layers: three views of one layer, their equations, initial values, precision."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from statespan.layers.config import LSSLConfig, S4Config, S4DConfig
from statespan.layers.s4 import LSSL, S4, S4D, LTIMixer
from statespan.models.build import build
from statespan.models.config import ModelConfig
from statespan.models.layer_pattern import LayerSpec
from statespan.ops.lti import hippo_matrices

HIDDEN, F64 = 6, torch.float64
KINDS = {
    "s4": {"s4": S4Config(state_size=64)},
    "s4d-lin": {"s4d": S4DConfig(state_size=64, init="lin")},
    "s4d-legs": {"s4d": S4DConfig(state_size=64, init="legs", discretization="bilinear")},
    "s4d-inv": {"s4d": S4DConfig(state_size=64, init="inv")},
    "s4d-real": {"s4d": S4DConfig(state_size=16, init="real")},
    "lssl": {"lssl": LSSLConfig(state_size=16, measure="legs", discretization="zoh")},
    "lssl-window": {"lssl": LSSLConfig(state_size=8, measure="legt")},
}


def fresh(kind: str, dtype: torch.dtype = F64) -> LTIMixer:
    """A layer with its initial values."""
    name, config = kind.partition("-")[0], KINDS[kind]
    model = build(ModelConfig(hidden_size=HIDDEN, layers=(LayerSpec(name),), **config), dtype=dtype)
    mixer = model.backbone.layers[0].mixer
    assert isinstance(mixer, LTIMixer)
    return mixer


def close(found: Tensor, truth: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found, truth, atol=tolerance * max(1.0, truth.abs().max().item()), rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_convolution_equals_recurrence(kind: str) -> None:
    """1024 tokens at once, token by token, and in uneven chunks."""
    mixer, hidden = fresh(kind), torch.randn(2, 1024, HIDDEN, dtype=F64)
    whole, _ = mixer(hidden)
    for sizes in ([1] * 1024, [500, 1, 23, 500]):
        state, parts = mixer.new_state(2, hidden.device, F64), []
        for piece in hidden.split(sizes, dim=1):
            out, state = mixer(piece, state)
            parts.append(out)
        close(torch.cat(parts, dim=1), whole)


def real_system(mixer: LTIMixer, channel: int) -> tuple[Tensor, Tensor, Tensor, float]:
    """A, B, C of x' = A x + B u, y = C x in real numbers, and dt, read from the parameters of one channel."""
    dt = mixer.log_dt[channel].exp().item()
    if isinstance(mixer, LSSL):
        return *hippo_matrices(mixer.measure, mixer.state_size), mixer.C[channel], dt
    rate = -mixer.log_A_real[channel].exp()
    if isinstance(mixer, S4D) and mixer.A_imag is None:
        return torch.diag(rate), torch.ones_like(rate), mixer.C[channel], dt
    A = torch.diag(torch.complex(rate, mixer.A_imag[channel]))
    C = torch.view_as_complex(mixer.C[channel])
    both = torch.block_diag(A, A.conj())
    B = torch.ones_like(C)
    if isinstance(mixer, S4):
        P, B = torch.view_as_complex(mixer.P[channel]), torch.view_as_complex(mixer.B[channel])
        both = both - torch.outer(torch.cat([P, P.conj()]), torch.cat([P, P.conj()]).conj())
    half = torch.eye(len(C), dtype=both.dtype)
    to_real = torch.cat([torch.cat([half, half], 1), torch.cat([-1j * half, 1j * half], 1)])  # 2 Re x, 2 Im x
    real = to_real @ both @ torch.linalg.inv(to_real)
    assert real.imag.abs().max() < 1e-8
    return real.real, 2 * torch.cat([B.real, B.imag]), torch.cat([C.real, -C.imag]), dt


@pytest.mark.parametrize("kind", ["s4d-lin", "s4d-inv", "s4d-real", "lssl"])
@torch.no_grad()
def test_continuous_view(kind: str) -> None:
    """The differential equation with u held over each step, solved by the matrix exponential (zero-order hold)."""
    mixer, u = fresh(kind), torch.randn(1, 1024, HIDDEN, dtype=F64)
    found = mixer._state_space(u, None, None)[0]
    for channel in range(HIDDEN):
        A, B, C, dt = real_system(mixer, channel)
        step = torch.matrix_exp(dt * A)
        pulse = torch.linalg.solve(A, step @ B - B)
        x, out = torch.zeros_like(B), []
        for value in u[0, :, channel]:
            x = step @ x + pulse * value
            out.append(C @ x + mixer.D[channel] * value)
        close(found[0, :, channel], torch.stack(out))


@pytest.mark.parametrize("kind", ["s4", "s4d-legs"])
@torch.no_grad()
def test_bilinear_layers_approach_the_continuous_view(kind: str) -> None:
    """With steps half as long and inputs held twice as long the error falls by about four."""
    mixer = fresh(kind)
    mixer.log_dt.fill_(math.log(2e-4))
    held = torch.linspace(0, 3, 32, dtype=F64).sin()
    A, B, C, dt = real_system(mixer, 0)
    step = torch.matrix_exp(dt * A)
    x, truth = torch.zeros_like(B), []
    for value in held:
        x = step @ x + torch.linalg.solve(A, step @ B - B) * value
        truth.append(C @ x + mixer.D[0] * value)
    errors = []
    for refinement in (2, 4):
        mixer.log_dt.fill_(math.log(2e-4 / refinement))
        u = held.repeat_interleave(refinement).view(1, -1, 1).expand(1, -1, HIDDEN)
        y = mixer._state_space(u, None, None)[0][0, refinement - 1 :: refinement, 0]
        errors.append((y - torch.stack(truth)).norm().item())
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)


@torch.no_grad()
def test_s4_starts_as_legs() -> None:
    """The eigenvalues of the parameters' A are those of LegS, -1 .. -N, and its kernel that of LegS stepped."""
    mixer = S4(HIDDEN, S4Config(state_size=8)).double()
    model = build(ModelConfig(hidden_size=HIDDEN, layers=(LayerSpec("s4"),), s4=S4Config(state_size=8)), dtype=F64)
    mixer.load_state_dict(model.backbone.layers[0].mixer.state_dict())
    A = real_system(mixer, 2)[0]
    close(torch.linalg.eigvals(A).real.sort().values, torch.arange(-8.0, 0.0, dtype=F64), 1e-6)


@torch.no_grad()
def test_initial_values() -> None:
    def eigenvalues(init: str) -> Tensor:
        mixer = fresh(f"s4d-{init}")
        assert isinstance(mixer, S4D) and mixer.A_imag is not None
        assert torch.equal(mixer.A_imag[0], mixer.A_imag[3])
        return torch.complex(-mixer.log_A_real.exp(), mixer.A_imag)[0]

    k = torch.arange(32, dtype=F64)
    half = torch.full_like(k, -0.5)
    close(eigenvalues("lin"), torch.complex(half, math.pi * k))  # with pi, unlike the Mamba paper's print
    close(eigenvalues("inv"), torch.complex(half, 64 / math.pi * (64 / (2 * k + 1) - 1)))
    close(eigenvalues("legs").real, half)
    assert eigenvalues("legs").imag.max().item() == pytest.approx(1303.27, abs=0.01)
    real = fresh("s4d-real")
    close(-real.log_A_real.exp()[1], -torch.arange(1.0, 17.0, dtype=F64))
    assert "A_imag" not in dict(real.named_parameters())
    wide = build(ModelConfig(hidden_size=4096, layers=(LayerSpec("s4d"),))).backbone.layers[0].mixer
    assert wide.log_dt.min() >= math.log(1e-3) and wide.log_dt.max() <= math.log(1e-1)
    assert wide.log_dt.mean().item() == pytest.approx(math.log(1e-2), abs=0.1)
    assert wide.C.pow(2).sum(-1).mean().item() == pytest.approx(1, rel=0.02)  # |C|^2
    assert wide.D.var().item() == pytest.approx(1, rel=0.1)
    assert wide.out_proj.weight.abs().max().item() <= 4096**-0.5


@pytest.mark.parametrize("block", ["gelu", "glu", "s5", "h3", "mamba"])
@torch.no_grad()
def test_blocks(block: str) -> None:
    """Each block written out round the same state-space part."""
    expand = 2 if block in ("h3", "mamba") else 1
    mixer = S4D(HIDDEN, S4DConfig(state_size=4, block=block, expand=expand, proj_bias=True)).double()  # type: ignore[arg-type]
    for parameter in mixer.parameters():
        parameter.normal_(std=0.5)
    hidden = torch.randn(2, 9, HIDDEN, dtype=F64)
    out = lambda y: y @ mixer.out_proj.weight.T + mixer.out_proj.bias  # noqa: E731  # a name for one matrix
    ssm = lambda u: mixer._state_space(u, None, None)[0]  # noqa: E731

    def conv(x: Tensor) -> Tensor:
        return torch.nn.functional.conv1d(
            torch.nn.functional.pad(x.mT, (3, 0)), mixer.conv1d.weight, mixer.conv1d.bias, groups=2 * HIDDEN
        ).mT

    if block in ("h3", "mamba"):
        parts = (hidden @ mixer.in_proj.weight.T + mixer.in_proj.bias).split(2 * HIDDEN, dim=-1)
    match block:
        case "gelu":
            expected = out(gelu(ssm(hidden)))
        case "glu":
            value, gate = out(gelu(ssm(hidden))).chunk(2, dim=-1)
            expected = value * torch.sigmoid(gate)
        case "s5":
            y = gelu(ssm(hidden))
            expected = y * torch.sigmoid(out(y))
        case "h3":
            k, v, q = parts
            expected = out(ssm(conv(k) * v) * q)
        case _:
            x, z = parts
            expected = out(ssm(silu(conv(x))) * silu(z))
    close(mixer(hidden)[0], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_every_parameter(kind: str) -> None:
    """Of a few entries each, against differences."""
    mixer, hidden = fresh(kind), torch.randn(1, 13, HIDDEN, dtype=F64)
    weight = torch.randn(1, 13, HIDDEN, dtype=F64)
    (mixer(hidden)[0] * weight).sum().backward()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None, name
        flat, gradient = parameter.data.view(-1), parameter.grad.view(-1)
        for index in {0, len(flat) // 2, len(flat) - 1}:
            kept, step = flat[index].item(), 1e-6 * max(1.0, abs(flat[index].item()))
            ends = []
            for sign in (1, -1):
                flat[index] = kept + sign * step
                with torch.no_grad():
                    ends.append((mixer(hidden)[0] * weight).sum().item())
            flat[index] = kept
            slope = (ends[0] - ends[1]) / (2 * step)
            assert gradient[index].item() == pytest.approx(slope, rel=1e-4, abs=1e-6 * gradient.abs().max().item())


@pytest.mark.parametrize("kind", ["s4", "s4d-lin", "s4d-real", "lssl"])
@torch.no_grad()
def test_low_precision_stays_out_of_the_state(kind: str) -> None:
    """Under bfloat16 autocast only the projections round: the state-space part and the state are float32."""
    mixer = fresh(kind, torch.float32)
    hidden = torch.randn(2, 100, HIDDEN).bfloat16().float()
    exact, exact_state = mixer._state_space(hidden, mixer.new_state(2, hidden.device, torch.float32).ssm, None)
    with torch.autocast("cpu", torch.bfloat16):
        found, state = mixer(hidden, mixer.new_state(2, hidden.device, torch.float32))
        out, _ = mixer.bfloat16()(hidden.bfloat16())
    assert state is not None and torch.equal(state.ssm, exact_state)
    assert found.dtype == out.dtype == torch.bfloat16
    value, gate = (gelu(exact).bfloat16() @ mixer.out_proj.weight.T).float().chunk(2, dim=-1)
    torch.testing.assert_close(found.float(), value * torch.sigmoid(gate), atol=0.02, rtol=0.02)


@torch.no_grad()
def test_training_cannot_make_it_unstable() -> None:
    """Whatever the parameters, A has no growing direction: long inputs stay bounded."""
    for mixer in (S4(HIDDEN, S4Config(state_size=8)), S4D(HIDDEN, S4DConfig(state_size=8))):
        for parameter in mixer.parameters():
            parameter.normal_(std=3.0)
        mixer.log_dt.normal_(std=1.0)
        state = mixer.new_state(1, torch.device("cpu"), torch.float32)
        norms = []
        for _ in range(6):
            _, state = mixer(torch.randn(1, 400, HIDDEN), state)
            norms.append(state.ssm.norm().item())
        assert all(math.isfinite(norm) for norm in norms) and norms[-1] < 10 * (norms[0] + norms[1])
