"""Original files of state-spaces/mamba, Codestral Mamba, and vLLM's names."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from statespan.checkpoints import convert, detect, load
from statespan.errors import CheckpointError

SIZES = {"d_model": 24, "n_layer": 2, "vocab_size": 93, "pad_vocab_size_multiple": 8}
RELEASED = SIZES | {"rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True}
MAMBA2 = RELEASED | {
    "d_intermediate": 0,
    "ssm_cfg": {"layer": "Mamba2", "headdim": 8, "d_state": 16, "ngroups": 2},
    "attn_layer_idx": [],
    "attn_cfg": {},
    "tie_embeddings": True,
}
ATTENTION = {
    "causal": True,
    "d_conv": 4,
    "head_dim": 10,
    "num_heads": 3,
    "num_heads_kv": 1,
    "out_proj_bias": False,
    "qkv_proj_bias": False,
    "rotary_emb_dim": 6,
}
PADDED = 96


def original_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of transformers' Mamba or Mamba2 under the original names, with the tied head."""
    names = {name.replace("backbone.embeddings", "backbone.embedding"): t for name, t in state.items()}
    return names | {"lm_head.weight": names["backbone.embedding.weight"]}


@pytest.fixture
def mamba(transformers: Any, randomise: Any) -> Any:
    config = transformers.MambaConfig(vocab_size=PADDED, hidden_size=24, num_hidden_layers=2)
    return randomise(transformers.MambaForCausalLM(config))


@pytest.fixture
def build_mamba2(transformers: Any, randomise: Any) -> Any:
    def build(**changes: Any) -> Any:
        sizes = {"hidden_size": 24, "num_heads": 6, "head_dim": 8, "n_groups": 2, "state_size": 16}
        sizes |= {"vocab_size": PADDED, "num_hidden_layers": 2, "tie_word_embeddings": True}
        return randomise(transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**sizes | changes)))

    return build


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, 93, (2, 19), generator=torch.Generator().manual_seed(2))


def write(folder: Path, config: dict[str, Any], state: dict[str, Tensor]) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(state, folder / "pytorch_model.bin")


def truth(theirs: Any, ids: Tensor) -> Tensor:
    """Logits of the real vocabulary; transformers takes the padding for tokens."""
    with torch.no_grad():
        return theirs(ids, use_cache=False).logits[..., :93]


@pytest.mark.parametrize("config", [RELEASED, SIZES | {"ssm_cfg": {}}, RELEASED | {"ssm_cfg": {"dt_rank": "auto"}}])
def test_mamba(config: dict[str, Any], mamba: Any, ids: Tensor, tmp_path: Path, assert_close: Any) -> None:
    write(tmp_path, config, original_names(mamba.state_dict()))
    assert detect(tmp_path) == "state-spaces"
    model = load(tmp_path)
    assert (model.config.vocab_size, model.embedding.weight.shape[0]) == (93, PADDED)
    with torch.no_grad():
        assert_close(model(ids).logits, truth(mamba, ids))


def test_mamba2(build_mamba2: Any, ids: Tensor, tmp_path: Path, assert_close: Any) -> None:
    theirs = build_mamba2()
    write(tmp_path, MAMBA2, original_names(theirs.state_dict()))
    with torch.no_grad():
        assert_close(load(tmp_path)(ids).logits, truth(theirs, ids))


def test_codestral_mamba(build_mamba2: Any, ids: Tensor, tmp_path: Path, assert_close: Any) -> None:
    """params.json, consolidated.safetensors, names with a prefix, an untied head, Mamba-2's default sizes."""
    changes = {"hidden_size": 64, "num_heads": 2, "head_dim": 64, "n_groups": 2, "state_size": 128, "vocab_size": 93}
    theirs = build_mamba2(**changes, tie_word_embeddings=False)
    params = {"dim": 64, "n_layers": 2, "vocab_size": 93, "n_groups": 2, "tie_embeddings": False, "rms_norm": True}
    params |= {"pad_vocab_size_multiple": 1, "residual_in_fp32": True, "fused_add_norm": True, "model_type": "mamba"}
    (tmp_path / "params.json").write_text(json.dumps(params))
    state = {name.replace("embeddings", "embedding"): tensor for name, tensor in theirs.state_dict().items()}
    save_file({f"model.{name}": tensor for name, tensor in state.items()}, tmp_path / "consolidated.safetensors")
    with torch.no_grad():
        assert_close(load(tmp_path)(ids).logits, truth(theirs, ids))


def test_names_of_vllm(mamba: Any, ids: Tensor, tmp_path: Path, assert_close: Any) -> None:
    """vLLM holds A = -exp(A_log)."""
    state = {
        name.replace(".A_log", ".A"): -torch.exp(tensor) if name.endswith("A_log") else tensor
        for name, tensor in original_names(mamba.state_dict()).items()
    }
    write(tmp_path, RELEASED, state)
    with torch.no_grad():
        assert_close(load(tmp_path)(ids).logits, truth(mamba, ids))


def rotate(x: Tensor, size: int) -> Tensor:
    """Rotary positions of flash-attn on the first `size` dimensions of [b t h d], halves paired."""
    angle = torch.arange(x.shape[1]).unsqueeze(1) * 10000.0 ** (-torch.arange(0, size, 2) / size)
    cos, sin = angle.cos().unsqueeze(1), angle.sin().unsqueeze(1)
    first, second, rest = x[..., : size // 2], x[..., size // 2 : size], x[..., size:]
    return torch.cat([first * cos - second * sin, first * sin + second * cos, rest], dim=-1)


def attention_layer(h: Tensor, w: dict[str, Tensor], prefix: str) -> Tensor:
    """MHA of mamba_ssm: a conv without activation over q, k and v, one key head, part of each head rotated."""
    qkv = h @ w[prefix + "mixer.in_proj.weight"].T
    conv = w[prefix + "mixer.conv1d.weight"]
    padded = functional.pad(qkv.transpose(1, 2), (3, 0))
    qkv = functional.conv1d(padded, conv, w[prefix + "mixer.conv1d.bias"], groups=len(conv)).transpose(1, 2)
    q, k, v = qkv.unflatten(-1, (5, 10)).split([3, 1, 1], dim=2)
    q, k = rotate(q, 6), rotate(k, 6)
    scores = torch.einsum("bthd,bsxd->bhts", q, k) / 10**0.5
    hidden = torch.triu(torch.ones(h.shape[1], h.shape[1], dtype=torch.bool), 1)
    mixed = torch.einsum("bhts,bsxd->bthd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)
    return mixed.flatten(2) @ w[prefix + "mixer.out_proj.weight"].T


def rms(h: Tensor, weight: Tensor) -> Tensor:
    return h * (h.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * weight


def test_attention_with_a_conv_and_a_gated_mlp(ids: Tensor, tmp_path: Path, assert_close: Any) -> None:
    """The attention layers of mamba2attn, and d_intermediate, against the equations written out."""
    generator = torch.Generator().manual_seed(3)
    shapes = {
        "norm.weight": (24,),
        "mixer.in_proj.weight": (50, 24),
        "mixer.conv1d.weight": (50, 1, 4),
        "mixer.conv1d.bias": (50,),
        "mixer.out_proj.weight": (24, 30),
        "norm2.weight": (24,),
        "mlp.fc1.weight": (256, 24),  # d_intermediate 100 rounded up to 128, twice
        "mlp.fc2.weight": (24, 128),
    }
    w = {f"backbone.layers.{i}.{name}": shape for i in range(2) for name, shape in shapes.items()}
    w = {name: torch.randn(shape, generator=generator) / shape[-1] ** 0.5 for name, shape in w.items()}
    w["backbone.embedding.weight"] = w["lm_head.weight"] = torch.randn(PADDED, 24, generator=generator)
    w["backbone.norm_f.weight"] = torch.rand(24, generator=generator)
    config = MAMBA2 | {"attn_layer_idx": [0, 1], "attn_cfg": ATTENTION, "d_intermediate": 100}
    write(tmp_path, config, w)
    h = w["backbone.embedding.weight"][ids]
    for i in range(2):
        prefix = f"backbone.layers.{i}."
        h = h + attention_layer(rms(h, w[prefix + "norm.weight"]), w, prefix)
        value, gate = (rms(h, w[prefix + "norm2.weight"]) @ w[prefix + "mlp.fc1.weight"].T).chunk(2, dim=-1)
        h = h + (value * functional.silu(gate)) @ w[prefix + "mlp.fc2.weight"].T
    expected = rms(h, w["backbone.norm_f.weight"]) @ w["lm_head.weight"].T
    with torch.no_grad():
        assert_close(load(tmp_path)(ids).logits, expected[..., :93])


def test_half_precision_files_keep_the_recurrence_in_float32(mamba: Any, tmp_path: Path) -> None:
    state = {name: tensor.half() for name, tensor in original_names(mamba.state_dict()).items()}
    write(tmp_path, RELEASED, state)
    for dtype, expected in ((None, torch.float32), (torch.bfloat16, torch.bfloat16)):
        model = load(tmp_path, dtype=dtype)
        for name, tensor in model.state_dict().items():
            kept = name.endswith(("A_log", ".D", "dt_bias"))
            assert tensor.dtype == (torch.float32 if kept else expected), name
        A_log = state["backbone.layers.0.mixer.A_log"].float()
        assert torch.equal(model.state_dict()["backbone.layers.0.mixer.A_log"], A_log)


def test_converted_to_transformers(mamba: Any, transformers: Any, ids: Tensor, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    write(source, RELEASED, original_names(mamba.state_dict()))
    convert(source, target, "transformers")
    back = transformers.AutoModelForCausalLM.from_pretrained(target)
    assert torch.equal(truth(back.eval(), ids), truth(mamba, ids))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rms_norm": False}, "rms_norm = false is not supported"),
        ({"ssm_cfg": {"layer": "Mamba3"}}, "layer must be Mamba1 or Mamba2, it is 'Mamba3'"),
        ({"ssm_cfg": {"d_sate": 16}}, "key 'd_sate' is not known here; did you mean 'd_state'"),
        ({"ssm_cfg": {"layer": "Mamba2", "D_has_hdim": True}}, "D_has_hdim = true is not supported"),
        ({"ssm_cfg": 5}, "ssm_cfg must be an object"),
        ({"attn_layer_idx": [2], "attn_cfg": ATTENTION}, "attn_layer_idx must be a list of layers from 0 to 1"),
        ({"attn_layer_idx": [1], "attn_cfg": ATTENTION | {"causal": False}}, "causal must be true"),
        ({"attn_layer_idx": [1], "attn_cfg": ATTENTION | {"mlp_dim": 64}}, "mlp_dim = 64 is not supported"),
        ({"d_model": "wide"}, "d_model must be a whole number of at least 1, it is 'wide'"),
        ({"n_layer": 0}, "n_layer must be a whole number of at least 1"),
        ({"tie_embeddings": "yes"}, "tie_embeddings must be true or false"),
    ],
)
def test_what_is_not_supported_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(RELEASED | changes))
    with pytest.raises(CheckpointError, match=message) as caught:
        load(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value) and "\n" not in str(caught.value)


def test_a_tied_head_that_differs_is_refused(mamba: Any, tmp_path: Path) -> None:
    state = original_names(mamba.state_dict())
    write(tmp_path, RELEASED, state | {"lm_head.weight": state["lm_head.weight"] + 1})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from backbone\.embedding\.weight"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(RELEASED | {"tie_embeddings": False}))
    assert torch.equal(load(tmp_path).head_weight, state["lm_head.weight"] + 1)
