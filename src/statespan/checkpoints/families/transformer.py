"""Llama, Mistral and Mixtral as transformers stores them: attention with rotary positions, and an MLP or experts."""

from collections.abc import Mapping
from typing import Any

from statespan.checkpoints.config_file import Fields
from statespan.checkpoints.families.family import (
    LAYER,
    Family,
    read_token_ids,
    refuse_unless,
    write_token_ids,
)
from statespan.checkpoints.weight_map import Row, equal_rows, experts, rows
from statespan.layers.config import AttentionConfig, MLPConfig, MoEConfig, RopeScaling
from statespan.models.config import ModelConfig
from statespan.models.layer_pattern import LayerSpec

THEIR_LAYER = "model.layers.{i}."
OUTER_ROWS = (
    Row("embedding.weight", "model.embed_tokens.weight"),
    Row("final_norm.weight", "model.norm.weight"),
    Row("lm_head.weight", "lm_head.weight"),
    Row(LAYER + "mixer_norm.weight", THEIR_LAYER + "input_layernorm.weight"),
    Row(LAYER + "feed_forward_norm.weight", THEIR_LAYER + "post_attention_layernorm.weight"),
)
IGNORED = (r"\.rotary_emb\.inv_freq$",)  # a buffer that older Llama files keep


def attention_rows(config: ModelConfig, theirs: str) -> list[Row]:
    """Rows of attention with separate q, k, v and o projections under the prefix `theirs`."""
    kv_size = config.attention_num_kv_heads * config.attention_head_dim
    sizes = (config.attention.num_heads * config.attention_head_dim, kv_size, kv_size)
    found: list[Row] = []
    for kind in ("weight", "bias"):
        parts = tuple(f"{theirs}{name}_proj.{kind}" for name in "qkv")
        found += [
            Row(f"{LAYER}mixer.qkv_proj.{kind}", parts, rows(*sizes), "attention"),
            Row(f"{LAYER}mixer.out_proj.{kind}", f"{theirs}o_proj.{kind}", only="attention"),
        ]
    return found


def mlp_rows(theirs: str) -> list[Row]:
    """Rows of a SwiGLU MLP with separate gate and up projections under the prefix `theirs`."""
    found: list[Row] = []
    for kind in ("weight", "bias"):
        parts = (f"{theirs}gate_proj.{kind}", f"{theirs}up_proj.{kind}")
        found += [
            Row(f"{LAYER}feed_forward.gate_up_proj.{kind}", parts, equal_rows),
            Row(f"{LAYER}feed_forward.down_proj.{kind}", f"{theirs}down_proj.{kind}"),
        ]
    return found


def expert_rows(theirs: str, *, gate: str, up: str, down: str, router: str) -> list[Row]:
    """Rows of SwiGLU experts under the prefix `theirs`, stored one by one, or stacked as transformers holds them."""
    each = theirs + "experts.{e}."
    return [
        Row(LAYER + "feed_forward.router.weight", f"{theirs}{router}.weight"),
        Row(LAYER + "feed_forward.experts.up_proj", (f"{each}{gate}.weight", f"{each}{up}.weight"), experts),
        Row(LAYER + "feed_forward.experts.down_proj", (f"{each}{down}.weight",), experts),
        Row(LAYER + "feed_forward.experts.up_proj", theirs + "experts.gate_up_proj"),
        Row(LAYER + "feed_forward.experts.down_proj", theirs + "experts.down_proj"),
    ]


def read_rope(fields: Fields, default_theta: float) -> dict[str, Any]:
    """The rotary base and scaling; they stand in rope_parameters (transformers 5) or in rope_theta and rope_scaling."""
    theta = fields.number("rope_theta", default_theta)
    fields.expect("partial_rotary_factor", 1.0)
    context = fields.integer("max_position_embeddings", 2048)
    scaling: RopeScaling | None = None
    for name in ("rope_scaling", "rope_parameters"):
        inner = fields.inner(name)
        theta = inner.number("rope_theta", theta)
        inner.expect("partial_rotary_factor", 1.0)
        for kind in ("type", "rope_type"):
            inner.expect(kind, "default", "llama3")
            if inner.take(kind) == "llama3":
                scaling = RopeScaling(
                    factor=inner.number("factor"),
                    low_freq_factor=inner.number("low_freq_factor"),
                    high_freq_factor=inner.number("high_freq_factor"),
                    original_context=inner.integer("original_max_position_embeddings", context),
                )
                if not 0 < scaling.low_freq_factor < scaling.high_freq_factor:
                    raise inner.error("high_freq_factor", scaling.high_freq_factor, "above low_freq_factor")
        inner.finish()
    return {"rope_theta": theta, "rope_scaling": scaling}


def write_rope(attention: AttentionConfig) -> dict[str, Any]:
    """The same keys for a file of transformers."""
    scaling = attention.rope_scaling
    if scaling is None:
        return {"rope_theta": attention.rope_theta}
    return {
        "rope_theta": attention.rope_theta,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_context,
        },
    }


def read_kv_heads(fields: Fields, num_heads: int, default: int | None) -> int:
    """Key and value heads; null means as many as queries, and so does absence where the class has no default."""
    if fields.take("num_key_value_heads", default) is None:
        return num_heads
    return fields.integer("num_key_value_heads", default)


def _read_shared(fields: Fields, *, intermediate_size: int, kv_heads: int | None, epsilon: float) -> dict[str, Any]:
    """Keys of all three; arguments are the class's defaults."""
    fields.expect("hidden_act", "silu", "swish")
    num_heads = fields.integer("num_attention_heads", 32)
    return {
        "vocab_size": fields.integer("vocab_size", 32000),
        "hidden_size": fields.integer("hidden_size", 4096),
        "num_layers": fields.integer("num_hidden_layers", 32),
        "attention": {
            "num_heads": num_heads,
            "num_kv_heads": read_kv_heads(fields, num_heads, kv_heads),
            "head_dim": fields.optional_integer("head_dim"),
        },
        "intermediate_size": fields.integer("intermediate_size", intermediate_size),
        "norm_epsilon": fields.number("rms_norm_eps", epsilon),
        "initializer_range": fields.number("initializer_range", 0.02),
        "tie_embeddings": fields.flag("tie_word_embeddings", False),
        **read_token_ids(fields, bos=1, eos=2, pad=None),
    }


def _build(shared: dict[str, Any], feed_forward: str, attention: AttentionConfig, **changes: Any) -> ModelConfig:
    layers = (LayerSpec.from_text(f"attention+{feed_forward}"),) * shared.pop("num_layers")
    return ModelConfig(layers=layers, attention=attention, **shared, **changes)


def read_llama(fields: Fields) -> ModelConfig:
    shared = _read_shared(fields, intermediate_size=11008, kv_heads=None, epsilon=1e-6)
    bias = fields.flag("attention_bias", False)
    attention = AttentionConfig(**shared.pop("attention"), **read_rope(fields, 1e4), qkv_bias=bias, out_bias=bias)
    mlp = MLPConfig(shared.pop("intermediate_size"), bias=fields.flag("mlp_bias", False))
    return _build(shared, "mlp", attention, mlp=mlp)


def read_mistral(fields: Fields) -> ModelConfig:
    shared = _read_shared(fields, intermediate_size=14336, kv_heads=8, epsilon=1e-6)
    window = fields.optional_integer("sliding_window") if "sliding_window" in fields.values else 4096
    attention = AttentionConfig(**shared.pop("attention"), **read_rope(fields, 1e4), sliding_window=window)
    return _build(shared, "mlp", attention, mlp=MLPConfig(shared.pop("intermediate_size")))


def read_mixtral(fields: Fields) -> ModelConfig:
    shared = _read_shared(fields, intermediate_size=14336, kv_heads=8, epsilon=1e-5)
    attention = AttentionConfig(
        **shared.pop("attention"),
        **read_rope(fields, 1e6),
        sliding_window=fields.optional_integer("sliding_window"),
    )
    fields.expect("router_jitter_noise", 0.0)
    moe = MoEConfig(
        num_experts=fields.integer("num_local_experts", 8),
        top_k=fields.integer("num_experts_per_tok", 2),
        intermediate_size=shared.pop("intermediate_size"),
        renormalize=True,
        load_balance_coef=read_load_balance(fields),
    )
    return _build(shared, "moe", attention, moe=moe)


def read_load_balance(fields: Fields) -> float:
    """The auxiliary loss's weight; transformers adds the loss only where it returns the router's logits."""
    weight = fields.number("router_aux_loss_coef", 0.001)
    return weight if fields.flag("output_router_logits", False) else 0.0


def write_load_balance(moe: MoEConfig) -> dict[str, Any]:
    """The same keys for a file of transformers."""
    if moe.load_balance_coef == 0:
        return {"output_router_logits": False}
    return {"output_router_logits": True, "router_aux_loss_coef": moe.load_balance_coef}


def refuse_odd_experts(moe: MoEConfig, family: str, *, renormalize: bool) -> None:
    """Refuse routers and experts that Mixtral-like files cannot express."""
    wanted = "renormalised" if renormalize else "plain"
    refuse_unless(moe.renormalize == renormalize, f"router weights that are not {wanted}", family)
    refuse_unless(moe.activation == "swiglu", f"{moe.activation} experts", family)
    refuse_unless(moe.score_function == "softmax", f"a {moe.score_function} router", family)
    refuse_unless(not moe.bias and not moe.router_bias, "biases in its experts or routers", family)


def _write_shared(config: ModelConfig, family: str) -> dict[str, Any]:
    attention = config.attention
    refuse_unless(config.final_norm == "rms", "a final LayerNorm", family)
    refuse_unless(attention.rope_theta is not None, "no rotary positions", family)
    refuse_unless(attention.learned_positions is None, "learnt positions", family)
    refuse_unless(attention.rotary_dim in (None, config.attention_head_dim), "partial rotary positions", family)
    refuse_unless(not attention.rotary_interleaved, "interleaved rotary positions", family)
    refuse_unless(attention.conv_kernel is None, "a conv in its attention", family)
    return {
        "vocab_size": config.padded_vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": len(config.layers),
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": config.attention_num_kv_heads,
        "head_dim": config.attention_head_dim,
        **write_rope(attention),
        "rms_norm_eps": config.norm_epsilon,
        "initializer_range": config.initializer_range,
        "hidden_act": "silu",
        "tie_word_embeddings": config.tie_embeddings,
        **write_token_ids(config),
    }


def refuse_odd_mlp(config: ModelConfig, family: str) -> None:
    """Refuse MLPs that are not SwiGLU."""
    refuse_unless(config.mlp.activation == "swiglu", f"{config.mlp.activation} MLPs", family)


def write_llama(config: ModelConfig) -> dict[str, Any]:
    refuse_odd_mlp(config, "llama")
    attention = config.attention
    refuse_unless(attention.qkv_bias == attention.out_bias, "biases on some of its attention projections", "llama")
    refuse_unless(config.hidden_size % attention.num_heads == 0, "heads that do not divide hidden_size", "llama")
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        **_write_shared(config, "llama"),
        "intermediate_size": config.mlp.intermediate_size,
        "attention_bias": attention.qkv_bias,
        "mlp_bias": config.mlp.bias,
    }


def write_mistral(config: ModelConfig) -> dict[str, Any]:
    refuse_odd_mlp(config, "mistral")
    biased = config.attention.qkv_bias or config.attention.out_bias or config.mlp.bias
    refuse_unless(not biased, "a sliding window and biases", "mistral")
    return {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        **_write_shared(config, "mistral"),
        "intermediate_size": config.mlp.intermediate_size,
        "sliding_window": config.attention.sliding_window,
    }


def write_mixtral(config: ModelConfig) -> dict[str, Any]:
    refuse_odd_experts(config.moe, "mixtral", renormalize=True)
    biased = config.attention.qkv_bias or config.attention.out_bias
    refuse_unless(not biased, "biases in its attention", "mixtral")
    return {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        **_write_shared(config, "mixtral"),
        "intermediate_size": config.moe.intermediate_size,
        "sliding_window": config.attention.sliding_window,
        "num_local_experts": config.moe.num_experts,
        "num_experts_per_tok": config.moe.top_k,
        **write_load_balance(config.moe),
    }


def _dense_table(config: ModelConfig) -> list[Row]:
    return [*OUTER_ROWS, *attention_rows(config, THEIR_LAYER + "self_attn."), *mlp_rows(THEIR_LAYER + "mlp.")]


def _mixtral_table(config: ModelConfig) -> list[Row]:
    experts_prefix = THEIR_LAYER + "block_sparse_moe."
    return [
        *OUTER_ROWS,
        *attention_rows(config, THEIR_LAYER + "self_attn."),
        *expert_rows(experts_prefix, gate="w1", up="w3", down="w2", router="gate"),
    ]


def _is(model_type: str) -> Any:
    def matches(raw: Mapping[str, Any]) -> bool:
        return raw.get("model_type") == model_type

    return matches


LLAMA = Family("llama", _is("llama"), read_llama, _dense_table, write_llama, ignored=IGNORED)
MISTRAL = Family("mistral", _is("mistral"), read_mistral, _dense_table, write_mistral, ignored=IGNORED)
MIXTRAL = Family(
    "mixtral",
    _is("mixtral"),
    read_mixtral,
    _mixtral_table,
    write_mixtral,
    renames=((r"\.mlp\.(gate|experts)\b", r".block_sparse_moe.\1"),),  # names in memory of transformers 5
    ignored=IGNORED,
)
