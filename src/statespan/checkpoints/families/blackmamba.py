"""BlackMamba as Zyphra releases it (arXiv 2402.01771): Mamba-1 layers alternating with experts. Read only.

Experts are gated: the paper says SwiGLU, the released code that runs the weights applies GELU to the gate; so do we.
"""

from typing import Any

from statespan.checkpoints.config_file import Fields
from statespan.checkpoints.families.family import LAYER, Family
from statespan.checkpoints.families.mamba import mamba1_rows
from statespan.checkpoints.weight_map import Row, experts
from statespan.errors import CheckpointError
from statespan.layers.config import Activation, Mamba1Config, MLPConfig, MoEConfig
from statespan.models.config import ModelConfig
from statespan.models.layer_pattern import LayerSpec

THEIR_LAYER = "decoder.layers.{i}."
ROWS = (
    Row("embedding.weight", "embedding.word_embeddings.weight"),
    Row("final_norm.weight", "decoder.final_layernorm.weight"),
    Row("final_norm.bias", "decoder.final_layernorm.bias"),
    Row(LAYER + "mixer_norm.weight", THEIR_LAYER + "norm.weight"),
    Row(LAYER + "feed_forward_norm.weight", THEIR_LAYER + "norm.weight"),
    Row(LAYER + "feed_forward.router.weight", THEIR_LAYER + "mixer.router.weight"),
    Row(LAYER + "feed_forward.router.bias", THEIR_LAYER + "mixer.router.bias"),
    *(
        Row(f"{LAYER}feed_forward.experts.{ours}", f"{THEIR_LAYER}mixer.local_experts.{{e}}.{theirs}", experts)
        for ours, theirs in (
            ("up_proj", "linear_fc1.weight"),
            ("up_proj_bias", "linear_fc1.bias"),
            ("down_proj", "linear_fc2.weight"),
            ("down_proj_bias", "linear_fc2.bias"),
        )
    ),
    *(
        Row(f"{LAYER}feed_forward.{ours}.{kind}", f"{THEIR_LAYER}mixer.{theirs}.{kind}")
        for ours, theirs in (
            ("gate_up_proj", "linear_fc1"),
            ("up_proj", "linear_fc1"),
            ("down_proj", "linear_fc2"),
        )
        for kind in ("weight", "bias")
    ),
)


def read_config(fields: Fields) -> ModelConfig:
    depth = fields.integer("num_layers")
    kinds = fields.take("mamba_moe_layers") or ["r"] * depth
    if not isinstance(kinds, list) or len(kinds) != depth:
        raise fields.error("mamba_moe_layers", kinds, f"a list of num_layers = {depth} entries")
    bias = fields.flag("add_bias_linear", False)
    # The flag says swiglu; the released code that runs these weights applies the exact GELU to the gate.
    activation: Activation = "geglu" if fields.flag("swiglu", True) else "gelu"
    intermediate_size = fields.integer("ffn_hidden_size", 4 * fields.integer("hidden_size"))
    num_experts = {int(kind) for kind in kinds if str(kind).isdigit() and int(kind) > 1}
    if len(num_experts) > 1:
        raise CheckpointError(
            f"{fields.where}: mamba_moe_layers has layers of {sorted(num_experts)} experts; only one number is read"
        )
    return ModelConfig(
        vocab_size=fields.integer("padded_vocab_size" if "padded_vocab_size" in fields.values else "vocab_size"),
        hidden_size=fields.integer("hidden_size"),
        layers=tuple(_layer(fields, kind) for kind in kinds),
        mamba1=Mamba1Config(
            expand=fields.integer("expansion_factor", 2),
            state_size=fields.integer("state_size", 16),
            conv_kernel=fields.integer("conv_dimension", 4),
            proj_bias=bias,
        ),
        mlp=MLPConfig(intermediate_size, activation, bias),
        moe=MoEConfig(
            num_experts=max(num_experts, default=1),
            top_k=1,
            intermediate_size=intermediate_size,
            activation=activation,
            bias=bias,
            router_bias=True,
            score_function="sigmoid",
            balancing="sinkhorn",
        ),
        final_norm="layer",
    )


def _layer(fields: Fields, kind: Any) -> LayerSpec:
    text = str(kind)
    if text == "r":
        return LayerSpec("mamba1")
    if text.isdigit() and int(text) > 0:
        return LayerSpec(None, "moe" if int(text) > 1 else "mlp")
    raise fields.error("mamba_moe_layers", kind, 'a list of "r" and numbers of experts')


BLACKMAMBA = Family(
    name="blackmamba",
    matches=lambda raw: "mamba_moe_layers" in raw,
    read_config=read_config,
    table=lambda config: [*ROWS, *mamba1_rows(THEIR_LAYER + "mixer.")],
    inert_keys=frozenset({"max_sequence_length", "vocab_size"}),
    has_model_type=False,
)
