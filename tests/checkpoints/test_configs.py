"""Configs of released checkpoints, odd ways to write them, and what must be refused."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from statespan.checkpoints.identify import identify
from statespan.errors import CheckpointError
from statespan.layers.config import RopeScaling
from statespan.models.config import ModelConfig

JAMBA_V01 = {
    "architectures": ["JambaForCausalLM"],
    "attention_dropout": 0.0,
    "attn_layer_offset": 4,
    "attn_layer_period": 8,
    "auto_map": {"AutoConfig": "configuration_jamba.JambaConfig"},
    "bos_token_id": 1,
    "calc_logits_for_entire_prompt": False,
    "eos_token_id": [2, 518],
    "expert_layer_offset": 1,
    "expert_layer_period": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "mamba_conv_bias": True,
    "mamba_d_conv": 4,
    "mamba_d_state": 16,
    "mamba_dt_rank": 256,
    "mamba_expand": 2,
    "mamba_inner_layernorms": True,
    "mamba_proj_bias": False,
    "model_type": "jamba",
    "n_ctx": 262144,
    "num_attention_heads": 32,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_logits_to_keep": 1,
    "output_router_logits": False,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0.dev0",
    "use_cache": True,
    "use_mamba_kernels": True,
    "vocab_size": 65536,
}
MAMBA_130M_HF = {
    "architectures": ["MambaForCausalLM"],
    "bos_token_id": 0,
    "conv_kernel": 4,
    "d_inner": 1536,
    "d_model": 768,
    "eos_token_id": 0,
    "expand": 2,
    "fused_add_norm": True,
    "hidden_act": "silu",
    "hidden_size": 768,
    "initializer_range": 0.1,
    "intermediate_size": 1536,
    "layer_norm_epsilon": 1e-05,
    "model_type": "mamba",
    "n_layer": 24,
    "num_hidden_layers": 24,
    "pad_token_id": 0,
    "pad_vocab_size_multiple": 8,
    "rescale_prenorm_residual": False,
    "residual_in_fp32": True,
    "rms_norm": True,
    "ssm_cfg": {},
    "state_size": 16,
    "time_step_floor": 0.0001,
    "time_step_init_scheme": "random",
    "time_step_max": 0.1,
    "time_step_min": 0.001,
    "time_step_rank": 48,
    "time_step_scale": 1.0,
    "torch_dtype": "float32",
    "transformers_version": "4.39.0.dev0",
    "use_bias": False,
    "use_cache": True,
    "use_conv_bias": True,
    "vocab_size": 50280,
}
MAMBA2ATTN_27B = {
    "d_model": 2560,
    "d_intermediate": 0,
    "n_layer": 64,
    "vocab_size": 50277,
    "ssm_cfg": {"layer": "Mamba2"},
    "attn_layer_idx": [9, 18, 27, 36, 45, 56],
    "attn_cfg": {
        "causal": True,
        "d_conv": 4,
        "head_dim": 128,
        "num_heads": 30,
        "out_proj_bias": False,
        "qkv_proj_bias": False,
        "rotary_emb_dim": 64,
    },
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 16,
    "tie_embeddings": True,
}
LLAMA_31 = {
    "model_type": "llama",
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "pretraining_tp": 1,
}


def read(config: dict[str, Any] | str, folder: Path) -> ModelConfig:
    text = config if isinstance(config, str) else json.dumps(config)
    (folder / "config.json").write_text(text)
    return identify(folder).read_config()


def test_jamba_as_released(tmp_path: Path) -> None:
    config = read(JAMBA_V01, tmp_path)
    layers = [str(spec) for spec in config.layers]
    assert [i for i, layer in enumerate(layers) if layer.startswith("attention")] == [4, 12, 20, 28]
    assert [i for i, layer in enumerate(layers) if layer.endswith("moe")] == list(range(1, 32, 2))
    assert config.eos_token_ids == (2, 518)
    assert config.mamba1.inner_norms and config.attention.rope_theta is None and not config.moe.renormalize
    assert config == read(JAMBA_V01 | {"mamba_dt_rank": "auto"}, tmp_path).replace(mamba1=config.mamba1)


def test_mamba_as_released(tmp_path: Path) -> None:
    config = read(MAMBA_130M_HF, tmp_path)
    assert (config.hidden_size, len(config.layers), config.mamba1_dt_rank, config.tie_embeddings) == (768, 24, 48, True)
    assert identify(tmp_path).family.name == "mamba"  # though it repeats the keys of the original config


def test_mamba2attn_as_released(tmp_path: Path) -> None:
    config = read(MAMBA2ATTN_27B, tmp_path)
    assert [i for i, spec in enumerate(config.layers) if spec.mixer == "attention"] == [9, 18, 27, 36, 45, 56]
    assert config.padded_vocab_size == 50288
    assert (config.attention.rotary_dim, config.attention.conv_kernel, config.attention_head_dim) == (64, 4, 128)


def test_llama_31_as_released(tmp_path: Path) -> None:
    attention = read(LLAMA_31, tmp_path).attention
    assert (attention.rope_theta, attention.rope_scaling) == (5e5, RopeScaling(8.0, 1.0, 4.0, 8192))


@pytest.mark.parametrize("infinity", ["Infinity", '{"__float__": "Infinity"}'])
def test_infinities(infinity: str, tmp_path: Path) -> None:
    text = '{"model_type": "mamba2", "norm_before_gate": true, "time_step_limit": [0.0, %s]}' % infinity  # noqa: UP031
    assert read(text, tmp_path).mamba2.dt_limit == (0.0, math.inf)


@pytest.mark.parametrize(("eos", "expected"), [(5, (5,)), ([5, 7], (5, 7)), (None, ()), (-1, ()), ([], ())])
def test_end_tokens(eos: Any, expected: tuple[int, ...], tmp_path: Path) -> None:
    assert read({"model_type": "llama", "eos_token_id": eos}, tmp_path).eos_token_ids == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llama", "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, 'rope_type = "yarn" is not'),
        (
            {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2.0}},
            'type = "linear" is not supported',
        ),
        ({"model_type": "llama", "rope_parameters": {"rope_type": "llama3"}}, "factor is missing"),
        ({"model_type": "llama", "rope_scaling": 2.0}, "rope_scaling must be an object, it is 2.0"),
        ({"model_type": "llama", "hidden_act": "gelu"}, 'hidden_act = "gelu" is not supported, only "silu"'),
        ({"model_type": "llama", "quantization_config": {"bits": 4}}, "key 'quantization_config' is not known here"),
        ({"model_type": "llama", "partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not supported"),
        ({"model_type": "llama", "hidden_size": -4}, "hidden_size must be a whole number of at least 1, it is -4"),
        ({"model_type": "llama", "hidden_size": 1.5}, "hidden_size must be a whole number"),
        ({"model_type": "llama", "hidden_size": True}, "hidden_size must be a whole number"),
        ({"model_type": "llama", "num_attention_heads": 3}, "num_heads 3 must divide hidden_size 4096; mend it there"),
        ({"model_type": "llama", "rms_norm_eps": "small"}, "rms_norm_eps must be a number, it is 'small'"),
        ({"model_type": "llama", "eos_token_id": "</s>"}, "eos_token_id must be a token id or a list"),
        ({"model_type": "llama", "hiden_size": 8}, "key 'hiden_size' is not known here; did you mean 'hidden_size'"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window must be a whole number of at least 1"),
        ({"model_type": "mixtral", "router_jitter_noise": 0.1}, "router_jitter_noise = 0.1 is not supported"),
        ({"model_type": "mixtral", "num_experts_per_tok": 9}, "top_k 9 must be 1 to num_experts 8"),
        ({"model_type": "mamba", "time_step_rank": "auto", "expand": 1.5}, "expand must be a whole number"),
        ({"model_type": "mamba", "rms_norm": False}, "rms_norm = false is not supported"),
        ({"model_type": "mamba2", "num_heads": 100}, r"num_heads must be expand \* hidden_size / head_dim = 128"),
        ({"model_type": "mamba2", "n_groups": 7}, "num_groups 7 must divide num_heads 128"),
        ({"model_type": "mamba2", "time_step_limit": [1.0, 0.5]}, "time_step_limit must be two rising numbers"),
        (JAMBA_V01 | {"mamba_inner_layernorms": False}, "mamba_inner_layernorms = false is not supported"),
        (JAMBA_V01 | {"attn_layer_offset": 8}, "attention offset 8 must be at least 0 and below the period 8"),
        (JAMBA_V01 | {"sliding_window": 4096}, "sliding_window = 4096 is not supported, only null is"),
        (JAMBA_V01 | {"mamba_dt_rank": "automatic"}, "mamba_dt_rank must be a whole number"),
    ],
)
def test_what_is_not_supported_is_refused(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        read(config, tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("config", [JAMBA_V01, MAMBA_130M_HF, MAMBA2ATTN_27B, LLAMA_31])
def test_every_key_of_a_released_config_was_read_or_is_inert(config: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="key 'made_up_feature' is not known here"):
        read(config | {"made_up_feature": 1}, tmp_path)
    read(config | {"made_up_feature": None}, tmp_path)  # a null asks for nothing
