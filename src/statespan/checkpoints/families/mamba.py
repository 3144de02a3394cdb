"""Mamba and Mamba-2 as transformers stores them."""

import math
from typing import Any

from statespan.checkpoints.config_file import Fields
from statespan.checkpoints.families.family import (
    LAYER,
    Family,
    read_token_ids,
    refuse_unless,
    subtree,
    write_token_ids,
)
from statespan.checkpoints.weight_map import Row, decay
from statespan.layers.config import Mamba1Config, Mamba2Config
from statespan.models.config import ModelConfig
from statespan.models.layer_pattern import LayerSpec

THEIR_LAYER = "backbone.layers.{i}."
OUTER_ROWS = (
    Row("embedding.weight", "backbone.embeddings.weight"),
    Row("final_norm.weight", "backbone.norm_f.weight"),
    Row("lm_head.weight", "lm_head.weight"),
    Row(LAYER + "mixer_norm.weight", THEIR_LAYER + "norm.weight"),
)
PROJECTION_NAMES = ("in_proj.weight", "in_proj.bias", "out_proj.weight", "out_proj.bias")
CONV_NAMES = ("conv1d.weight", "conv1d.bias")
RENAMES = (
    (r"^model\.(backbone|lm_head)\.", r"\1."),  # Codestral Mamba
    (r"^backbone\.embedding\.", "backbone.embeddings."),  # original files
)
# Keys of released files that repeat others, or that transformers ignores: its gated RMSNorm is always after the gate.
_REPEATED = """d_inner d_model n_layer ssm_cfg pad_vocab_size_multiple fused_add_norm intermediate_size use_mambapy
    use_associative_scan use_mamba_kernels rescale_prenorm_residual time_step_init_scheme time_step_scale
    norm_before_gate"""
REPEATED_KEYS = frozenset(_REPEATED.split())


def mamba1_rows(theirs: str) -> list[Row]:
    """Rows of a Mamba-1 mixer under the prefix `theirs`."""
    names = (*PROJECTION_NAMES, *CONV_NAMES, "x_proj.weight", "dt_proj.weight", "A_log", "D")
    return [
        *subtree(LAYER + "mixer.", theirs, names, only="mamba1"),
        Row(LAYER + "mixer.dt_bias", theirs + "dt_proj.bias", only="mamba1"),
        Row(LAYER + "mixer.A_log", theirs + "A", decay, only="mamba1"),
    ]


def mamba2_rows(theirs: str) -> list[Row]:
    """Rows of a Mamba-2 mixer under the prefix `theirs`."""
    names = (*PROJECTION_NAMES, *CONV_NAMES, "dt_bias", "A_log", "D", "norm.weight")
    return [
        *subtree(LAYER + "mixer.", theirs, names, only="mamba2"),
        Row(LAYER + "mixer.A_log", theirs + "A", decay, only="mamba2"),
    ]


def _read_shared(fields: Fields, *, vocab_size: int, hidden_size: int, num_layers: int) -> dict[str, Any]:
    """Keys of both models that ModelConfig holds; arguments are the class's defaults."""
    fields.expect("hidden_act", "silu", "swish")
    fields.expect("rms_norm", True)
    return {
        "vocab_size": fields.integer("vocab_size", vocab_size),
        "hidden_size": fields.integer("hidden_size", hidden_size),
        "num_layers": fields.integer("num_hidden_layers", num_layers),
        "norm_epsilon": fields.number("layer_norm_epsilon", 1e-5),
        "residual_float32": fields.flag("residual_in_fp32", True),
        "initializer_range": fields.number("initializer_range", 0.1),
    }


def _write_shared(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.padded_vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": len(config.layers),
        "layer_norm_epsilon": config.norm_epsilon,
        "residual_in_fp32": config.residual_float32,
        "initializer_range": config.initializer_range,
        "hidden_act": "silu",
        "tie_word_embeddings": config.tie_embeddings,
        **write_token_ids(config),
    }


def _dt_fields(fields: Fields) -> dict[str, Any]:
    return {
        "dt_min": fields.number("time_step_min", 1e-3),
        "dt_max": fields.number("time_step_max", 1e-1),
        "dt_floor": fields.number("time_step_floor", 1e-4),
    }


def _write_dt_fields(mixer: Mamba1Config | Mamba2Config) -> dict[str, float]:
    return {"time_step_min": mixer.dt_min, "time_step_max": mixer.dt_max, "time_step_floor": mixer.dt_floor}


def read_dt_rank(fields: Fields, name: str) -> int | None:
    """A rank as a number, or None for "auto"."""
    return None if fields.take(name, "auto") == "auto" else fields.integer(name)


def read_mamba1(fields: Fields) -> ModelConfig:
    shared = _read_shared(fields, vocab_size=50280, hidden_size=768, num_layers=32)
    mixer = Mamba1Config(
        expand=fields.integer("expand", 2),
        state_size=fields.integer("state_size", 16),
        conv_kernel=fields.integer("conv_kernel", 4),
        dt_rank=read_dt_rank(fields, "time_step_rank"),
        conv_bias=fields.flag("use_conv_bias", True),
        proj_bias=fields.flag("use_bias", False),
        **_dt_fields(fields),
    )
    return ModelConfig(
        layers=(LayerSpec("mamba1"),) * shared.pop("num_layers"),
        mamba1=mixer,
        tie_embeddings=fields.flag("tie_word_embeddings", True),
        **shared,
        **read_token_ids(fields, bos=0, eos=0, pad=0),
    )


def write_mamba1(config: ModelConfig) -> dict[str, Any]:
    mixer = config.mamba1
    refuse_unless(not mixer.inner_norms, "norms on dt, B and C", "mamba")
    refuse_unless(mixer.discretization == "mamba", f"{mixer.discretization} discretization", "mamba")
    refuse_unless(config.final_norm == "rms", "a final LayerNorm", "mamba")
    return {
        "model_type": "mamba",
        "architectures": ["MambaForCausalLM"],
        **_write_shared(config),
        "expand": mixer.expand,
        "state_size": mixer.state_size,
        "conv_kernel": mixer.conv_kernel,
        "time_step_rank": config.mamba1_dt_rank,
        "use_conv_bias": mixer.conv_bias,
        "use_bias": mixer.proj_bias,
        **_write_dt_fields(mixer),
    }


def read_mamba2(fields: Fields) -> ModelConfig:
    shared = _read_shared(fields, vocab_size=32768, hidden_size=4096, num_layers=64)
    num_heads, head_dim = fields.integer("num_heads", 128), fields.integer("head_dim", 64)
    expand = fields.integer("expand", 2)
    if num_heads * head_dim != expand * shared["hidden_size"]:
        wanted = expand * shared["hidden_size"] / head_dim
        raise fields.error("num_heads", num_heads, f"expand * hidden_size / head_dim = {wanted:g}")
    fields.take("time_step_rank")  # computed by transformers and never used
    mixer = Mamba2Config(
        expand=expand,
        state_size=fields.integer("state_size", 128),
        head_dim=head_dim,
        num_heads=num_heads,
        num_groups=fields.integer("n_groups", 8),
        conv_kernel=fields.integer("conv_kernel", 4),
        conv_bias=fields.flag("use_conv_bias", True),
        proj_bias=fields.flag("use_bias", False),
        dt_limit=read_dt_limit(fields, "time_step_limit"),
        chunk_size=fields.integer("chunk_size", 256),
        **_dt_fields(fields),
    )
    return ModelConfig(
        layers=(LayerSpec("mamba2"),) * shared.pop("num_layers"),
        mamba2=mixer,
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        **shared,
        **read_token_ids(fields, bos=0, eos=2, pad=1),
    )


def read_dt_limit(fields: Fields, name: str) -> tuple[float, float]:
    """The clamp of dt; absent and null mean none."""
    value = fields.take(name)
    if value is None:
        return (0.0, math.inf)
    numbers = isinstance(value, list) and all(isinstance(bound, int | float) for bound in value)
    if not numbers or len(value) != 2 or not value[0] < value[1]:
        raise fields.error(name, value, "two rising numbers")
    return (float(value[0]), float(value[1]))


def write_mamba2(config: ModelConfig) -> dict[str, Any]:
    mixer = config.mamba2
    heads, inner = config.mamba2_num_heads, mixer.expand * config.hidden_size
    refuse_unless(mixer.discretization == "mamba", f"{mixer.discretization} discretization", "mamba2")
    refuse_unless(mixer.gated_norm and not mixer.norm_before_gate, "no RMSNorm after the gate", "mamba2")
    refuse_unless(mixer.norm_groups in (None, mixer.num_groups), "a gated norm with groups of its own", "mamba2")
    refuse_unless(heads * mixer.head_dim == inner, "num_heads * head_dim other than expand * hidden_size", "mamba2")
    refuse_unless(config.final_norm == "rms", "a final LayerNorm", "mamba2")
    limit = {} if mixer.dt_limit == (0.0, math.inf) else {"time_step_limit": list(mixer.dt_limit)}
    return {
        "model_type": "mamba2",
        "architectures": ["Mamba2ForCausalLM"],
        **_write_shared(config),
        "expand": mixer.expand,
        "state_size": mixer.state_size,
        "head_dim": mixer.head_dim,
        "num_heads": heads,
        "n_groups": mixer.num_groups,
        "conv_kernel": mixer.conv_kernel,
        "use_conv_bias": mixer.conv_bias,
        "use_bias": mixer.proj_bias,
        "chunk_size": mixer.chunk_size,
        **limit,
        **_write_dt_fields(mixer),
    }


MAMBA = Family(
    name="mamba",
    matches=lambda raw: raw.get("model_type") == "mamba" and "dim" not in raw,
    read_config=read_mamba1,
    write_config=write_mamba1,
    table=lambda config: [*OUTER_ROWS, *mamba1_rows(THEIR_LAYER + "mixer.")],
    renames=RENAMES,
    inert_keys=REPEATED_KEYS,
)

MAMBA2 = Family(
    name="mamba2",
    matches=lambda raw: raw.get("model_type") == "mamba2",
    read_config=read_mamba2,
    write_config=write_mamba2,
    table=lambda config: [*OUTER_ROWS, *mamba2_rows(THEIR_LAYER + "mixer.")],
    renames=RENAMES,
    inert_keys=REPEATED_KEYS,
)
