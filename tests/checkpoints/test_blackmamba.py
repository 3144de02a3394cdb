"""BlackMamba's files against its equations written out."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from statespan.checkpoints import detect, load
from statespan.errors import CheckpointError

CONFIG = {
    "num_layers": 4,
    "hidden_size": 20,
    "state_size": 6,
    "conv_dimension": 4,
    "vocab_size": 61,
    "expansion_factor": 2,
    "mamba_moe_layers": ["r", "3", "r", "1"],
    "ffn_hidden_size": 11,
    "add_bias_linear": False,
    "swiglu": True,
    "max_sequence_length": 2048,
}


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    up = 11 * (2 if config["swiglu"] else 1)
    names: dict[str, tuple[int, ...]] = {"embedding.word_embeddings.weight": (61, 20)}
    for i, kind in enumerate(config["mamba_moe_layers"]):
        own = {"norm.weight": (20,)}
        if kind == "r":
            own |= {"mixer.in_proj.weight": (80, 20), "mixer.conv1d.weight": (40, 1, 4), "mixer.conv1d.bias": (40,)}
            own |= {"mixer.x_proj.weight": (14, 40), "mixer.dt_proj.weight": (40, 2), "mixer.dt_proj.bias": (40,)}
            own |= {"mixer.A_log": (40, 6), "mixer.D": (40,), "mixer.out_proj.weight": (20, 40)}
            biased = {"mixer.in_proj": 80, "mixer.out_proj": 20}
        else:
            experts = ["mixer."] if kind == "1" else [f"mixer.local_experts.{e}." for e in range(int(kind))]
            if kind != "1":
                own |= {"mixer.router.weight": (int(kind), 20), "mixer.router.bias": (int(kind),)}
            own |= {f"{e}linear_fc1.weight": (up, 20) for e in experts}
            own |= {f"{e}linear_fc2.weight": (20, 11) for e in experts}
            biased = {f"{e}linear_fc{n}": size for e in experts for n, size in ((1, up), (2, 20))}
        if config["add_bias_linear"]:
            own |= {f"{name}.bias": (size,) for name, size in biased.items()}
        names |= {f"decoder.layers.{i}.{name}": shape for name, shape in own.items()}
    return names | {"decoder.final_layernorm.weight": (20,), "decoder.final_layernorm.bias": (20,)}


def random_weights(config: dict[str, Any]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {name: torch.randn(shape, generator=generator) * 0.4 for name, shape in shapes(config).items()}


class Reference:
    """The released inference code's equations, token after token; its gate is GELU, whatever the flag is called."""

    def __init__(self, weights: dict[str, Tensor], config: dict[str, Any]) -> None:
        self.weights, self.config = weights, config

    def linear(self, x: Tensor, name: str) -> Tensor:
        return functional.linear(x, self.weights[name + ".weight"], self.weights.get(name + ".bias"))

    def mamba(self, x: Tensor, name: str) -> Tensor:
        w, time = self.weights, x.shape[1]
        u, z = self.linear(x, name + "in_proj").chunk(2, dim=-1)
        padded = functional.pad(u.transpose(1, 2), (3, 0))
        u = functional.silu(
            functional.conv1d(padded, w[name + "conv1d.weight"], w[name + "conv1d.bias"], groups=40)
        ).transpose(1, 2)
        dt, B, C = (u @ w[name + "x_proj.weight"].T).split([2, 6, 6], dim=-1)
        dt, A = functional.softplus(self.linear(dt, name + "dt_proj")), -torch.exp(w[name + "A_log"])
        h, y = torch.zeros(len(x), 40, 6), []
        for t in range(time):
            h = torch.exp(dt[:, t, :, None] * A) * h + (dt * u)[:, t, :, None] * B[:, t, None]
            y.append((h * C[:, t, None]).sum(-1) + w[name + "D"] * u[:, t])
        return self.linear(torch.stack(y, 1) * functional.silu(z), name + "out_proj")

    def expert(self, x: Tensor, name: str) -> Tensor:
        up = self.linear(x, name + "linear_fc1")
        if self.config["swiglu"]:
            gate, up = up.chunk(2, dim=-1)
            return self.linear(functional.gelu(gate) * up, name + "linear_fc2")
        return self.linear(functional.gelu(up), name + "linear_fc2")

    def moe(self, x: Tensor, name: str) -> Tensor:
        probability, index = self.linear(x, name + "router").sigmoid().max(-1, keepdim=True)
        outputs = torch.stack([self.expert(x, f"{name}local_experts.{e}.") for e in range(3)], dim=-1)
        return probability * outputs.gather(-1, index.unsqueeze(-1).expand(*x.shape, 1)).squeeze(-1)

    def logits(self, ids: Tensor) -> Tensor:
        w = self.weights
        x = w["embedding.word_embeddings.weight"][ids]
        for i, kind in enumerate(self.config["mamba_moe_layers"]):
            name = f"decoder.layers.{i}."
            h = x * (x.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * w[name + "norm.weight"]
            layer = {"r": self.mamba, "1": self.expert}.get(kind, self.moe)
            x = x + layer(h, name + "mixer.")
        x = functional.layer_norm(
            x, (20,), w["decoder.final_layernorm.weight"], w["decoder.final_layernorm.bias"], 1e-5
        )
        return x @ w["embedding.word_embeddings.weight"].T


@pytest.mark.parametrize("swiglu", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_logits(swiglu: bool, bias: bool, tmp_path: Path, assert_close: Any) -> None:
    config = CONFIG | {"swiglu": swiglu, "add_bias_linear": bias}
    weights = random_weights(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save({"model": weights}, tmp_path / "pytorch_model.bin")
    assert detect(tmp_path) == "blackmamba"
    ids = torch.randint(0, 61, (2, 17))
    with torch.no_grad():
        assert_close(load(tmp_path)(ids).logits, Reference(weights, config).logits(ids))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (["r", "8", "r", "4"], r"layers of \[4, 8\] experts"),
        (["r", "r8", "r", "8"], "mamba_moe_layers must be a list"),
        (["r", "8"], "mamba_moe_layers must be a list of num_layers = 4 entries"),
        ("r8r8", "mamba_moe_layers must be a list"),
    ],
)
def test_layers_that_cannot_be(layers: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"mamba_moe_layers": layers}))
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)
