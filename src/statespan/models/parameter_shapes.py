"""The shape of each parameter of a mixer or feed-forward layer, from the config alone; names are the module's."""

from statespan.layers.config import MLPConfig, MoEConfig, SSMBlockConfig
from statespan.models.config import ModelConfig
from statespan.ops.activation import GATED

Shapes = dict[str, tuple[int, ...]]  # parameter name inside the module: shape


def mixer_shapes(config: ModelConfig, mixer: str) -> Shapes:
    """Shape of each parameter of a mixer, by its name in the module."""
    match mixer:
        case "mamba1":
            return _mamba1_shapes(config)
        case "mamba2":
            return _mamba2_shapes(config)
        case "attention":
            return _attention_shapes(config)
        case "s4" | "s4d" | "lssl":
            return _lti_shapes(config, mixer)
        case "s6":
            return _s6_shapes(config)
        case _:
            return _recurrent_shapes(config, gates=4 if mixer == "lstm" else 3)


def _mamba1_shapes(config: ModelConfig) -> Shapes:
    sizes, hidden = config.mamba1, config.hidden_size
    inner, rank, states = config.mamba1_inner_size, config.mamba1_dt_rank, sizes.state_size
    shapes = _linear("in_proj", 2 * inner, hidden, sizes.proj_bias)
    shapes |= _conv(inner, sizes.conv_kernel, sizes.conv_bias)
    shapes |= {"x_proj.weight": (rank + 2 * states, inner), "dt_proj.weight": (inner, rank), "dt_bias": (inner,)}
    shapes |= {"A_log": (inner, states), "D": (inner,)}
    if sizes.inner_norms:
        shapes |= {"dt_layernorm.weight": (rank,), "b_layernorm.weight": (states,), "c_layernorm.weight": (states,)}
    return shapes | _linear("out_proj", hidden, inner, sizes.proj_bias)


def _mamba2_shapes(config: ModelConfig) -> Shapes:
    sizes, hidden = config.mamba2, config.hidden_size
    inner, heads, conv = config.mamba2_inner_size, config.mamba2_num_heads, config.mamba2_conv_size
    shapes = _linear("in_proj", inner + conv + heads, hidden, sizes.proj_bias)
    shapes |= _conv(conv, sizes.conv_kernel, sizes.conv_bias)
    shapes |= {"dt_bias": (heads,), "A_log": (heads,), "D": (heads,)}
    if sizes.gated_norm:
        shapes["norm.weight"] = (inner,)
    return shapes | _linear("out_proj", hidden, inner, sizes.proj_bias)


def _attention_shapes(config: ModelConfig) -> Shapes:
    sizes, hidden = config.attention, config.hidden_size
    queries, qkv = sizes.num_heads * config.attention_head_dim, config.attention_qkv_size
    shapes = _linear("qkv_proj", qkv, hidden, sizes.qkv_bias)
    if sizes.conv_kernel:
        shapes |= _conv(qkv, sizes.conv_kernel, bias=True)
    if sizes.learned_positions is not None:
        shapes["position_embedding.weight"] = (sizes.learned_positions, hidden)
    return shapes | _linear("out_proj", hidden, queries, sizes.out_bias)


def _lti_shapes(config: ModelConfig, mixer: str) -> Shapes:
    sizes = config.ssm_block(mixer)
    inner, states = sizes.inner_size(config.hidden_size), sizes.state_size
    shapes = _block_shapes(config, sizes) | {"log_dt": (inner,), "D": (inner,)}
    if mixer == "lssl":
        return shapes | {"C": (inner, states)}
    if mixer == "s4d" and config.s4d.init == "real":
        return shapes | {"log_A_real": (inner, states), "C": (inner, states)}
    pairs = (inner, states // 2)
    shapes |= {"log_A_real": pairs, "A_imag": pairs, "C": (*pairs, 2)}
    return shapes | ({"P": (*pairs, 2), "B": (*pairs, 2)} if mixer == "s4" else {})


def _s6_shapes(config: ModelConfig) -> Shapes:
    sizes, states = config.s6, config.s6.state_size
    inner, rank = sizes.inner_size(config.hidden_size), sizes.rank(config.hidden_size)
    shapes = _block_shapes(config, sizes) | {"dt_bias": (inner,), "A_log": (inner, states), "D": (inner,)}
    return shapes | {"x_proj.weight": (rank + 2 * states, inner), "dt_proj.weight": (inner, rank)}


def _block_shapes(config: ModelConfig, sizes: SSMBlockConfig) -> Shapes:
    """What stands round an SSM."""
    hidden, inner = config.hidden_size, sizes.inner_size(config.hidden_size)
    shapes = _linear("out_proj", 2 * hidden if sizes.block == "glu" else hidden, inner, sizes.proj_bias)
    parts = {"h3": 3, "mamba": 2}.get(sizes.block)
    if parts is None:
        return shapes
    return shapes | _linear("in_proj", parts * inner, hidden, sizes.proj_bias) | _conv(inner, sizes.conv_kernel, True)


def _recurrent_shapes(config: ModelConfig, gates: int) -> Shapes:
    hidden = config.hidden_size
    shapes: Shapes = {f"rnn.weight_{side}_l0": (gates * hidden, hidden) for side in ("ih", "hh")}
    if config.recurrent.bias:
        shapes |= {f"rnn.bias_{side}_l0": (gates * hidden,) for side in ("ih", "hh")}
    return shapes


def feed_forward_shapes(config: ModelConfig, feed_forward: str) -> Shapes:
    """Shape of each parameter of a feed-forward layer, by its name in the module."""
    hidden = config.hidden_size
    sizes: MLPConfig | MoEConfig = config.mlp if feed_forward == "mlp" else config.moe
    inner, gated = sizes.intermediate_size, sizes.activation in GATED
    up = 2 * inner if gated else inner
    if isinstance(sizes, MLPConfig):
        name = "gate_up_proj" if gated else "up_proj"
        return _linear(name, up, hidden, sizes.bias) | _linear("down_proj", hidden, inner, sizes.bias)
    shapes = _linear("router", sizes.num_experts, hidden, sizes.router_bias)
    for name, rows, columns in (("up_proj", up, hidden), ("down_proj", hidden, inner)):
        shapes[f"experts.{name}"] = (sizes.num_experts, rows, columns)
        if sizes.bias:
            shapes[f"experts.{name}_bias"] = (sizes.num_experts, rows)
    return shapes


def _linear(name: str, rows: int, columns: int, bias: bool) -> Shapes:
    return {f"{name}.weight": (rows, columns)} | ({f"{name}.bias": (rows,)} if bias else {})


def _conv(channels: int, taps: int, bias: bool) -> Shapes:
    return {"conv1d.weight": (channels, 1, taps)} | ({"conv1d.bias": (channels,)} if bias else {})
