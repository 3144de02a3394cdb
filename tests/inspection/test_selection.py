"""What a text makes of Mamba's recurrences, against float64 loops over the weights and against the layers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from statespan.inspection import Selection, hidden_attention, memory_lengths, selection_of
from statespan.layers.config import Mamba1Config, Mamba2Config
from statespan.layers.mamba1 import Mamba1
from statespan.layers.mamba2 import Mamba2

HIDDEN, LENGTH = 12, 19
MAMBA1 = {
    "plain": Mamba1Config(state_size=5),
    "jamba": Mamba1Config(state_size=3, inner_norms=True, proj_bias=True, conv_bias=False),
    "zoh": Mamba1Config(state_size=4, discretization="zoh", conv_kernel=2),
    "bilinear": Mamba1Config(state_size=4, discretization="bilinear"),
}
MAMBA2 = {
    "plain": Mamba2Config(state_size=6, head_dim=8, chunk_size=4),
    "groups": Mamba2Config(state_size=5, head_dim=4, num_groups=3, norm_before_gate=True),
    "limits": Mamba2Config(state_size=4, head_dim=12, dt_limit=(0.3, 0.9), gated_norm=False),
    "bilinear": Mamba2Config(state_size=1, head_dim=6, discretization="bilinear"),
}


def randomized(mixer: Mamba1 | Mamba2, size: float = 0.5) -> Mamba1 | Mamba2:
    mixer = mixer.double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.copy_(torch.randn_like(parameter) * size)
    return mixer


def text() -> Tensor:
    return torch.randn(1, LENGTH, HIDDEN, dtype=torch.float64)


def array(x: Tensor | None) -> np.ndarray:
    assert x is not None
    return x.detach().numpy()


def convolved(x: np.ndarray, mixer: Mamba1 | Mamba2) -> np.ndarray:
    """silu of the causal conv, tap by tap."""
    weight, out = array(mixer.conv1d.weight)[:, 0], np.zeros_like(x)
    for t in range(len(x)):
        for k in range(weight.shape[1]):
            if (source := t - weight.shape[1] + 1 + k) >= 0:
                out[t] += weight[:, k] * x[source]
    out += 0 if mixer.conv1d.bias is None else array(mixer.conv1d.bias)
    return out / (1 + np.exp(-out))


def normed(x: np.ndarray, weight: Tensor, epsilon: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * array(weight)


@pytest.mark.parametrize("kind", MAMBA1)
def test_mamba1_step_sizes_are_those_of_the_equations(kind: str) -> None:
    mixer, hidden = randomized(Mamba1(HIDDEN, MAMBA1[kind])), text()
    assert isinstance(mixer, Mamba1)
    xz = array(hidden)[0] @ array(mixer.in_proj.weight).T
    xz += 0 if mixer.in_proj.bias is None else array(mixer.in_proj.bias)
    x = convolved(xz[:, : mixer.inner_size], mixer)
    parts = x @ array(mixer.x_proj.weight).T
    dt, B, C = np.split(parts, [mixer.rank, mixer.rank + mixer.state_size], axis=1)
    if mixer.config.inner_norms:
        norms = (mixer.dt_layernorm, mixer.b_layernorm, mixer.c_layernorm)
        dt, B, C = (normed(part, norm.weight, 1e-5) for part, norm in zip((dt, B, C), norms, strict=True))
    dt = np.log1p(np.exp(dt @ array(mixer.dt_proj.weight).T + array(mixer.dt_bias)))
    selection = selection_of(mixer, hidden)
    for found, expected in (
        (selection.dt, dt),
        (selection.u[..., 0], x),
        (selection.B[:, 0], B),
        (selection.C[:, 0], C),
    ):
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", MAMBA2)
def test_mamba2_step_sizes_are_those_of_the_equations(kind: str) -> None:
    mixer, hidden = randomized(Mamba2(HIDDEN, MAMBA2[kind])), text()
    assert isinstance(mixer, Mamba2)
    low, high = mixer.config.dt_limit
    raw = array(hidden)[0] @ array(mixer.in_proj.weight)[-mixer.num_heads :].T + array(mixer.dt_bias)
    np.testing.assert_allclose(
        selection_of(mixer, hidden).dt.numpy(), np.log1p(np.exp(raw)).clip(low, high), rtol=1e-10
    )


def output_of(mixer: Mamba1 | Mamba2, hidden: Tensor, y: Tensor) -> Tensor:
    """What the layer makes of the scan's output y [t c p] after its gate."""
    if isinstance(mixer, Mamba1):
        return mixer.out_proj(y.flatten(1) * F.silu(mixer.in_proj(hidden)[0, :, mixer.inner_size :]))
    z = mixer.in_proj(hidden)[0, :, : mixer.inner_size]
    return mixer.out_proj(mixer.norm(y.flatten(1), z) if mixer.config.gated_norm else y.flatten(1) * F.silu(z))


@pytest.mark.parametrize("mixer_class", [Mamba1, Mamba2])
@pytest.mark.parametrize("place", range(4))
def test_the_hidden_attention_times_the_input_is_the_layers_output(mixer_class: type, place: int) -> None:
    config = list((MAMBA1 if mixer_class is Mamba1 else MAMBA2).values())[place]
    mixer, hidden = randomized(mixer_class(HIDDEN, config)), text()
    selection = selection_of(mixer, hidden)
    alpha = hidden_attention(selection, range(selection.num_channels))
    assert torch.equal(alpha, alpha.tril())
    y = torch.einsum("cts,scp->tcp", alpha, selection.u) + selection.D[:, None] * selection.u
    with torch.no_grad():
        torch.testing.assert_close(output_of(mixer, hidden, y), mixer(hidden)[0][0], rtol=1e-9, atol=1e-10)


def test_chosen_channels_are_rows_of_the_whole() -> None:
    for mixer in (Mamba1(HIDDEN, MAMBA1["plain"]), Mamba2(HIDDEN, MAMBA2["groups"])):
        selection = selection_of(randomized(mixer), text())
        whole = hidden_attention(selection, range(selection.num_channels))
        torch.testing.assert_close(hidden_attention(selection, [4, 1]), whole[[4, 1]], rtol=1e-13, atol=0)


def test_states_that_are_wiped_out_give_no_nan() -> None:
    """exp(dt A) underflows to 0, the logarithm of which would be no number."""
    selection = selection_of(randomized(Mamba1(HIDDEN, MAMBA1["plain"])), text())
    selection = replace(selection, dt=selection.dt * 1e5)
    alpha = hidden_attention(selection, [0, 3])
    assert torch.isfinite(alpha).all()
    assert torch.count_nonzero(alpha.tril(-1)) == 0 and torch.count_nonzero(alpha) > 0


@pytest.mark.parametrize("discretization", ["mamba", "zoh", "bilinear"])
def test_memory_is_the_time_in_which_a_free_state_falls_to_1_over_e(discretization: str) -> None:
    """A state is let go free over the text: it falls by exp(-t / memory)."""
    for mixer in (Mamba1(HIDDEN, MAMBA1["plain"]), Mamba2(HIDDEN, MAMBA2["plain"])):
        selection = replace(selection_of(randomized(mixer, 0.3), text()), discretization=discretization)
        state = np.ones(tuple(selection.A.shape))
        for t in range(LENGTH):
            step = array(selection.dt)[t][:, None] * array(selection.A)
            state = state * ((1 + step / 2) / (1 - step / 2) if discretization == "bilinear" else np.exp(step))
        memory = memory_lengths(selection).numpy()
        np.testing.assert_allclose(np.exp(-LENGTH / memory), np.abs(state), rtol=1e-9)


def test_a_constant_step_has_the_memory_that_the_formula_says() -> None:
    one = torch.ones(7, 1, 1, dtype=torch.float64)
    selection = Selection(one, 0.02 * one[..., 0], torch.tensor([[-1.0, -16.0]]).double(), one, one, one[0, 0], "mamba")
    torch.testing.assert_close(memory_lengths(selection), torch.tensor([[50.0, 3.125]], dtype=torch.float64))


def test_a_bfloat16_layer_is_read_as_it_is() -> None:
    mixer = Mamba1(HIDDEN, MAMBA1["jamba"]).bfloat16()
    selection = selection_of(mixer, text().bfloat16())
    assert selection.dt.dtype == torch.float64
    assert torch.equal(selection.dt[3, 2].exp().sub(1).log().isfinite(), torch.tensor(True))
