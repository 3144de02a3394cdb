"""Jamba as AI21 releases it and transformers stores it (arXiv 2403.19887)."""

from typing import Any

from statespan.checkpoints.config_file import Fields
from statespan.checkpoints.families.family import (
    LAYER,
    NATIVE_HINT,
    Family,
    read_token_ids,
    refuse_unless,
    subtree,
    write_token_ids,
)
from statespan.checkpoints.families.mamba import mamba1_rows, read_dt_rank
from statespan.checkpoints.families.transformer import (
    attention_rows,
    expert_rows,
    mlp_rows,
    read_kv_heads,
    read_load_balance,
    refuse_odd_experts,
    refuse_odd_mlp,
    write_load_balance,
)
from statespan.checkpoints.weight_map import Row
from statespan.errors import CheckpointError
from statespan.layers.config import AttentionConfig, Mamba1Config, MLPConfig, MoEConfig
from statespan.models.config import ModelConfig
from statespan.models.layer_pattern import pattern_from_periods

THEIR_LAYER = "model.layers.{i}."
_INERT = "calc_logits_for_entire_prompt num_logits_to_keep n_ctx use_mamba_kernels use_mambapy use_associative_scan"
INNER_NORMS = ("dt_layernorm.weight", "b_layernorm.weight", "c_layernorm.weight")


def table(config: ModelConfig) -> list[Row]:
    return [
        Row("embedding.weight", "model.embed_tokens.weight"),
        Row("final_norm.weight", "model.final_layernorm.weight"),
        Row("lm_head.weight", "lm_head.weight"),
        Row(LAYER + "mixer_norm.weight", THEIR_LAYER + "input_layernorm.weight"),
        Row(LAYER + "feed_forward_norm.weight", THEIR_LAYER + "pre_ff_layernorm.weight"),
        *_mixer_rows(config),
        *mlp_rows(THEIR_LAYER + "feed_forward."),
        *expert_rows(THEIR_LAYER + "feed_forward.", gate="gate_proj", up="up_proj", down="down_proj", router="router"),
    ]


def _mixer_rows(config: ModelConfig) -> list[Row]:
    mamba = [
        *mamba1_rows(THEIR_LAYER + "mamba."),
        *subtree(LAYER + "mixer.", THEIR_LAYER + "mamba.", INNER_NORMS, only="mamba1"),
    ]
    return [*mamba, *attention_rows(config, THEIR_LAYER + "self_attn.")]


def read_config(fields: Fields) -> ModelConfig:
    fields.expect("hidden_act", "silu", "swish")
    fields.expect("mamba_inner_layernorms", True)
    fields.expect("sliding_window")
    num_heads, num_experts = fields.integer("num_attention_heads", 32), fields.integer("num_experts", 16)
    intermediate_size = fields.integer("intermediate_size", 14336)
    expert_period = fields.integer("expert_layer_period", 2)
    layers = pattern_from_periods(
        fields.integer("num_hidden_layers", 32),
        attention_period=fields.integer("attn_layer_period", 8),
        attention_offset=fields.integer("attn_layer_offset", 4, least=0),
        expert_period=expert_period if num_experts > 1 else None,  # one expert is a plain MLP
        expert_offset=fields.integer("expert_layer_offset", 1, least=0),
    )
    return ModelConfig(
        vocab_size=fields.integer("vocab_size", 65536),
        hidden_size=fields.integer("hidden_size", 4096),
        layers=layers,
        mamba1=_read_mixer(fields),
        attention=AttentionConfig(
            num_heads=num_heads,
            num_kv_heads=read_kv_heads(fields, num_heads, 8),
            head_dim=fields.optional_integer("head_dim"),
        ),
        mlp=MLPConfig(intermediate_size),
        moe=MoEConfig(
            num_experts=num_experts,
            top_k=fields.integer("num_experts_per_tok", 2),
            intermediate_size=intermediate_size,
            load_balance_coef=read_load_balance(fields),
        ),
        norm_epsilon=fields.number("rms_norm_eps", 1e-6),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        initializer_range=fields.number("initializer_range", 0.02),
        **read_token_ids(fields, bos=1, eos=2, pad=0),
    )


def _read_mixer(fields: Fields) -> Mamba1Config:
    return Mamba1Config(
        expand=fields.integer("mamba_expand", 2),
        state_size=fields.integer("mamba_d_state", 16),
        conv_kernel=fields.integer("mamba_d_conv", 4),
        dt_rank=read_dt_rank(fields, "mamba_dt_rank"),
        conv_bias=fields.flag("mamba_conv_bias", True),
        proj_bias=fields.flag("mamba_proj_bias", False),
        inner_norms=True,
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    mixer, attention = config.mamba1, config.attention
    attention_period, attention_offset = _period([spec.mixer == "attention" for spec in config.layers], "attention")
    has_experts = [spec.feed_forward == "moe" for spec in config.layers]
    expert_period, expert_offset = _period(has_experts, "experts")
    _refuse_odd(config)
    return {
        "model_type": "jamba",
        "architectures": ["JambaForCausalLM"],
        "vocab_size": config.padded_vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": len(config.layers),
        "attn_layer_period": attention_period,
        "attn_layer_offset": attention_offset,
        "expert_layer_period": expert_period,
        "expert_layer_offset": expert_offset,
        "intermediate_size": config.moe.intermediate_size if any(has_experts) else config.mlp.intermediate_size,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": config.attention_num_kv_heads,
        "num_experts": config.moe.num_experts if any(has_experts) else 1,
        "num_experts_per_tok": config.moe.top_k,
        "mamba_expand": mixer.expand,
        "mamba_d_state": mixer.state_size,
        "mamba_d_conv": mixer.conv_kernel,
        "mamba_dt_rank": config.mamba1_dt_rank,
        "mamba_conv_bias": mixer.conv_bias,
        "mamba_proj_bias": mixer.proj_bias,
        "rms_norm_eps": config.norm_epsilon,
        "initializer_range": config.initializer_range,
        "hidden_act": "silu",
        "tie_word_embeddings": config.tie_embeddings,
        **write_load_balance(config.moe),
        **write_token_ids(config),
    }


def _period(hits: list[bool], what: str) -> tuple[int, int]:
    """The period and offset that give these layers; a period beyond the depth where there are none."""
    depth = len(hits)
    if not any(hits):
        return depth + 1, depth
    for period in range(1, depth + 1):
        for offset in range(period):
            if hits == [i % period == offset for i in range(depth)]:
                return period, offset
    raise CheckpointError(
        f"this model has {what} at layers without a period, which jamba cannot express; {NATIVE_HINT}"
    )


def _refuse_odd(config: ModelConfig) -> None:
    mixers, feed_forwards = ({getattr(spec, half) for spec in config.layers} for half in ("mixer", "feed_forward"))
    refuse_unless(config.final_norm == "rms", "a final LayerNorm", "jamba")
    if "mamba1" in mixers:
        refuse_unless(config.mamba1.inner_norms, "no norms on dt, B and C", "jamba")
        discretization = config.mamba1.discretization
        refuse_unless(discretization == "mamba", f"{discretization} discretization", "jamba")
    if "attention" in mixers:
        _refuse_odd_attention(config)
    if "mlp" in feed_forwards:
        refuse_odd_mlp(config, "jamba")
        refuse_unless(not config.mlp.bias, "biases in its MLPs", "jamba")
    if "moe" in feed_forwards:
        refuse_odd_experts(config.moe, "jamba", renormalize=False)
        refuse_unless(config.moe.num_experts > 1, "a single expert", "jamba")
    if feed_forwards == {"mlp", "moe"}:
        one_size = config.mlp.intermediate_size == config.moe.intermediate_size
        refuse_unless(one_size, "experts and MLPs of different sizes", "jamba")


def _refuse_odd_attention(config: ModelConfig) -> None:
    attention = config.attention
    refuse_unless(attention.rope_theta is None, "rotary positions", "jamba")
    refuse_unless(attention.learned_positions is None, "learnt positions", "jamba")
    refuse_unless(attention.sliding_window is None, "a sliding window", "jamba")
    refuse_unless(attention.conv_kernel is None, "a conv in its attention", "jamba")
    refuse_unless(not attention.qkv_bias and not attention.out_bias, "biases in its attention", "jamba")
    plain = config.attention_head_dim * attention.num_heads == config.hidden_size
    refuse_unless(plain, "a head_dim other than hidden_size / num_heads", "jamba")


JAMBA = Family(
    name="jamba",
    matches=lambda raw: raw.get("model_type") == "jamba",
    read_config=read_config,
    write_config=write_config,
    table=table,
    renames=(  # names of the first release
        (r"\.moe\.", ".feed_forward."),
        (r"\.pre_moe_layernorm\.", ".pre_ff_layernorm."),
    ),
    inert_keys=frozenset(_INERT.split()),
)
