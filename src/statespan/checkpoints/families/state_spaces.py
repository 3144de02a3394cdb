"""The original files of state-spaces/mamba (Mamba, Mamba-2, mamba2attn), and Codestral Mamba. Read only."""

from collections.abc import Mapping
from typing import Any

from statespan.checkpoints.config_file import Fields
from statespan.checkpoints.families.family import LAYER, Family
from statespan.checkpoints.families.mamba import (
    OUTER_ROWS,
    RENAMES,
    THEIR_LAYER,
    mamba1_rows,
    mamba2_rows,
    read_dt_limit,
    read_dt_rank,
)
from statespan.checkpoints.weight_map import Row, swapped_halves
from statespan.layers.config import AttentionConfig, Mamba1Config, Mamba2Config, MLPConfig
from statespan.models.config import ModelConfig
from statespan.models.layer_pattern import LayerSpec, MixerName

MLP_MULTIPLE = 128  # GatedMLP rounds its width up to this
MLP_ROWS = (
    Row(LAYER + "feed_forward_norm.weight", THEIR_LAYER + "norm2.weight"),
    # fc1 has the values before the gates, ours the gates first
    Row(LAYER + "feed_forward.gate_up_proj.weight", THEIR_LAYER + "mlp.fc1.weight", swapped_halves),
    Row(LAYER + "feed_forward.down_proj.weight", THEIR_LAYER + "mlp.fc2.weight"),
)


def attention_rows() -> list[Row]:
    """Rows of MHA, whose in_proj is our qkv_proj."""
    modules = (("qkv_proj", "in_proj"), ("out_proj", "out_proj"), ("conv1d", "conv1d"))
    return [
        Row(f"{LAYER}mixer.{ours}.{kind}", f"{THEIR_LAYER}mixer.{theirs}.{kind}", only="attention")
        for ours, theirs in modules
        for kind in ("weight", "bias")
    ]


def table(config: ModelConfig) -> list[Row]:
    mixer = THEIR_LAYER + "mixer."
    return [*OUTER_ROWS, *MLP_ROWS, *mamba1_rows(mixer), *mamba2_rows(mixer), *attention_rows()]


def matches(raw: Mapping[str, Any]) -> bool:
    original = "d_model" in raw and "n_layer" in raw and "model_type" not in raw
    codestral = "dim" in raw and "n_layers" in raw and raw.get("model_type") == "mamba"
    return original or codestral


def read_config(fields: Fields) -> ModelConfig:
    fields.expect("rms_norm", True)
    if "dim" in fields.values:
        sizes = {"hidden_size": fields.integer("dim"), "num_layers": fields.integer("n_layers")}
        mixer: dict[str, Any] = {"mamba2": Mamba2Config(num_groups=fields.integer("n_groups", 8))}
    else:
        sizes = {"hidden_size": fields.integer("d_model"), "num_layers": fields.integer("n_layer")}
        mixer = _read_mixer(fields.inner("ssm_cfg"))
    name: MixerName = "mamba2" if "mamba2" in mixer else "mamba1"
    intermediate_size = fields.integer("d_intermediate", 0, least=0)
    return ModelConfig(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=sizes["hidden_size"],
        layers=_layers(fields, sizes["num_layers"], name, "mlp" if intermediate_size else None),
        attention=_read_attention(fields.inner("attn_cfg"), used=bool(fields.take("attn_layer_idx"))),
        mlp=MLPConfig(-(-intermediate_size // MLP_MULTIPLE) * MLP_MULTIPLE),
        tie_embeddings=fields.flag("tie_embeddings", True),
        vocab_multiple=fields.integer("pad_vocab_size_multiple", 8),
        residual_float32=fields.flag("residual_in_fp32", True),
        bos_token_id=fields.token_id("bos_token_id"),
        eos_token_ids=fields.token_ids("eos_token_id"),
        pad_token_id=fields.token_id("pad_token_id"),
        **mixer,
    )


def _layers(fields: Fields, depth: int, mixer: MixerName, feed_forward: Any) -> tuple[LayerSpec, ...]:
    places = fields.take("attn_layer_idx") or []
    if not isinstance(places, list) or any(not isinstance(i, int) or not 0 <= i < depth for i in places):
        raise fields.error("attn_layer_idx", places, f"a list of layers from 0 to {depth - 1}")
    return tuple(LayerSpec("attention" if i in places else mixer, feed_forward) for i in range(depth))


def _read_mixer(ssm: Fields) -> dict[str, Any]:
    kind = ssm.take("layer", "Mamba1")
    if kind not in ("Mamba1", "Mamba2"):
        raise ssm.error("layer", kind, "Mamba1 or Mamba2")
    shared = {
        "expand": ssm.integer("expand", 2),
        "conv_kernel": ssm.integer("d_conv", 4),
        "conv_bias": ssm.flag("conv_bias", True),
        "proj_bias": ssm.flag("bias", False),
        "dt_min": ssm.number("dt_min", 1e-3),
        "dt_max": ssm.number("dt_max", 1e-1),
        "dt_floor": ssm.number("dt_init_floor", 1e-4),
    }
    for only_speed_or_start in (
        "use_fast_path",
        "use_mem_eff_path",
        "conv_init",
        "dt_init",
        "dt_scale",
        "A_init_range",
    ):
        ssm.take(only_speed_or_start)
    if kind == "Mamba1":
        mixer: dict[str, Any] = {"mamba1": _mamba1(ssm, shared)}
    else:
        mixer = {"mamba2": _mamba2(ssm, shared)}
    ssm.finish()
    return mixer


def _mamba1(ssm: Fields, shared: dict[str, Any]) -> Mamba1Config:
    return Mamba1Config(state_size=ssm.integer("d_state", 16), dt_rank=read_dt_rank(ssm, "dt_rank"), **shared)


def _mamba2(ssm: Fields, shared: dict[str, Any]) -> Mamba2Config:
    ssm.expect("D_has_hdim", False)
    ssm.expect("d_ssm")
    return Mamba2Config(
        state_size=ssm.integer("d_state", 128),
        head_dim=ssm.integer("headdim", 64),
        num_groups=ssm.integer("ngroups", 1),
        gated_norm=ssm.flag("rmsnorm", True),
        norm_before_gate=ssm.flag("norm_before_gate", False),
        dt_limit=read_dt_limit(ssm, "dt_limit"),
        chunk_size=ssm.integer("chunk_size", 256),
        **shared,
    )


def _read_attention(attn: Fields, *, used: bool) -> AttentionConfig:
    if not used:
        return AttentionConfig()
    if attn.take("causal") is not True:
        raise attn.error("causal", attn.take("causal"), "true")
    attn.expect("softmax_scale")
    attn.expect("mlp_dim", 0)
    rotary_dim = attn.integer("rotary_emb_dim", 0, least=0)
    theta = attn.number("rotary_emb_base", 10000.0)
    config = AttentionConfig(
        num_heads=attn.integer("num_heads"),
        num_kv_heads=attn.optional_integer("num_heads_kv"),
        head_dim=attn.optional_integer("head_dim"),
        rope_theta=theta if rotary_dim else None,
        rotary_dim=rotary_dim or None,
        rotary_interleaved=attn.flag("rotary_emb_interleaved", False),
        qkv_bias=attn.flag("qkv_proj_bias", True),
        out_bias=attn.flag("out_proj_bias", True),
        conv_kernel=attn.integer("d_conv", 0, least=0) or None,
    )
    attn.finish()
    return config


STATE_SPACES = Family(
    name="state-spaces",
    matches=matches,
    read_config=read_config,
    table=table,
    renames=RENAMES,
    has_model_type=False,
    inert_keys=frozenset({"fused_add_norm", "initializer_cfg"}),
)
