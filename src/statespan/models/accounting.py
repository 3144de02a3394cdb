"""What a config costs before anything is built: parameters, FLOPs a token, KV-cache and state bytes a sequence.

Everything follows from the shapes of a layer's parameters (`parameter_shapes.py`) and the sizes of a mixer's state. A
FLOP is one addition or one multiplication.
"""

import math
from dataclasses import dataclass

from statespan.layers.config import AttentionConfig
from statespan.models.config import ModelConfig
from statespan.models.layer_pattern import LayerSpec
from statespan.models.parameter_shapes import Shapes, feed_forward_shapes, mixer_shapes
from statespan.ops.activation import GATED

NOT_MULTIPLIED = ("A_log", "_bias", "log_A_real", "A_imag", ".P", ".B", ".C", "position_embedding.weight")
TRAINING_FACTOR = 3  # the backward pass multiplies twice for each multiplication of the forward pass


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters."""

    total: int
    active: int  # that one token meets: of the experts, top_k of num_experts
    embedding: int = 0  # embedding and untied head, contained in both


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Parameters of the whole model.

    Example:
        >>> from statespan.models.presets import preset
        >>> count_parameters(preset("mamba-130m")).total
        129135360
    """
    embedding = config.padded_vocab_size * config.hidden_size * (1 if config.tie_embeddings else 2)
    outside = embedding + config.hidden_size * (2 if config.final_norm == "layer" else 1)
    layers = [count_layer_parameters(config, spec) for spec in config.layers]
    total, active = sum(layer.total for layer in layers), sum(layer.active for layer in layers)
    return ParameterCount(outside + total, outside + active, embedding)


def count_layer_parameters(config: ModelConfig, spec: LayerSpec) -> ParameterCount:
    """Parameters of one layer with its norms."""
    shapes = _layer_shapes(config, spec)
    norms = config.hidden_size * ((spec.mixer is not None) + (spec.feed_forward is not None))
    return ParameterCount(
        norms + sum(math.prod(shape) for shape in shapes.values()),
        norms + sum(_active_size(config, name, shape) for name, shape in shapes.items()),
    )


def _layer_shapes(config: ModelConfig, spec: LayerSpec) -> Shapes:
    mixer = {} if spec.mixer is None else mixer_shapes(config, spec.mixer)
    feed_forward = {} if spec.feed_forward is None else feed_forward_shapes(config, spec.feed_forward)
    return {f"mixer.{k}": v for k, v in mixer.items()} | {f"feed_forward.{k}": v for k, v in feed_forward.items()}


def _active_size(config: ModelConfig, name: str, shape: tuple[int, ...]) -> int:
    experts = name.startswith("feed_forward.experts.")
    return math.prod(shape) // config.moe.num_experts * config.moe.top_k if experts else math.prod(shape)


def forward_flops(config: ModelConfig, context_length: int) -> int:
    """FLOPs of one token's forward pass when it is the `context_length`-th of its sequence (itself included).

    2 for each active entry of a matrix or conv tap (the head included, the embedding not), and for each mixer
    - Mamba-1, S6: 7 d n for h = exp(dt A) h + (dt u) B, y = C h   (d channels, n states);
    - Mamba-2: 5 h p n for the same with one decay a head      (h heads of width p);
    - S4 20 d n, S4D 7 d n (real: 5 d n), LSSL 2 d n (n+2) for one step of the recurrence (n real states);
    - attention: 4 h p t for q k^T and the weighted sum of v   (t visible tokens, at most the sliding window).
    Work of order d (norms, activations, gates, biases) is left out.

    Example:
        >>> from statespan.models.presets import preset
        >>> round(forward_flops(preset("mamba-130m"), context_length=2048) / 1e9, 2)
        0.26
    """
    head = 2 * config.padded_vocab_size * config.hidden_size
    return head + sum(layer_forward_flops(config, spec, context_length) for spec in config.layers)


def layer_forward_flops(config: ModelConfig, spec: LayerSpec, context_length: int) -> int:
    """The share of one layer in `forward_flops`."""
    matrices = sum(
        2 * _active_size(config, name, shape)
        for name, shape in _layer_shapes(config, spec).items()
        if len(shape) > 1 and not name.endswith(NOT_MULTIPLIED)
    )
    match spec.mixer:
        case "mamba1":
            return matrices + 7 * config.mamba1_inner_size * config.mamba1.state_size
        case "mamba2":
            return matrices + 5 * config.mamba2_inner_size * config.mamba2.state_size
        case "s6":
            return matrices + 7 * config.s6.inner_size(config.hidden_size) * config.s6.state_size
        case "s4" | "s4d" | "lssl":
            return matrices + _lti_step_flops(config, spec.mixer)
        case "attention":
            width = config.attention.num_heads * config.attention_head_dim
            return matrices + 4 * width * _visible(config, context_length)
        case _:
            return matrices


def _lti_step_flops(config: ModelConfig, mixer: str) -> int:
    sizes = config.ssm_block(mixer)
    states = sizes.state_size
    per_state = {"s4": 20, "s4d": 5 if config.s4d.init == "real" else 7}.get(mixer, 2 * (states + 2))
    return per_state * sizes.inner_size(config.hidden_size) * states


def training_flops(config: ModelConfig, sequence_length: int) -> int:
    """FLOPs of training on one token, the mean over a sequence: three times the forward pass.

    Attention's share at position t grows with t up to the window w, so its mean is taken over 1 .. sequence_length.
    """
    window = _visible(config, sequence_length)
    visible = window * (window + 1) // 2 + (sequence_length - window) * window  # sum of min(t, w) over t
    width = config.attention.num_heads * config.attention_head_dim
    attention = sum(spec.mixer == "attention" for spec in config.layers) * 4 * width
    return TRAINING_FACTOR * (forward_flops(config, 0) + attention * visible // sequence_length)


def _visible(config: ModelConfig, context_length: int) -> int:
    window = config.attention.sliding_window
    return context_length if window is None else min(context_length, window)


def kv_bytes_per_token(config: ModelConfig, value_bytes: int = 2) -> int:
    """Bytes by which the KV cache of one sequence grows a token, while inside the sliding window."""
    layers = sum(spec.mixer == "attention" for spec in config.layers)
    return layers * 2 * config.attention_num_kv_heads * config.attention_head_dim * value_bytes


def kv_bytes(config: ModelConfig, context_length: int, value_bytes: int = 2) -> int:
    """Bytes of the keys and values of one sequence of `context_length` tokens.

    Example:
        >>> from statespan.models.presets import preset
        >>> [kv_bytes(preset(name), 256 * 1024) / 2**30 for name in ("jamba-v0.1", "mixtral-8x7b")]
        [4.0, 32.0]
    """
    return kv_bytes_per_token(config, value_bytes) * _visible(config, context_length)


def transformer_like(config: ModelConfig) -> ModelConfig:
    """A Transformer of the same size, to compare caches with.

    It has a block, one attention and one MLP, for every two sub-layers of `config`: 12 for the 24 of mamba-130m, 32 for
    the 64 of Jamba. Its attention is that of `config` where it has any, whose heads may share keys and values;
    otherwise every head has its own.

    Example:
        >>> from statespan.models.presets import preset
        >>> [kv_bytes(transformer_like(preset(name)), 256 * 1024) / 2**30 for name in ("jamba-v0.1", "mamba-130m")]
        [32.0, 9.0]
    """
    sublayers = sum((spec.mixer is not None) + (spec.feed_forward is not None) for spec in config.layers)
    own = any(spec.mixer == "attention" for spec in config.layers)
    attention = config.attention if own else AttentionConfig(num_heads=1)
    return config.replace(layers=(LayerSpec("attention", "mlp"),) * -(-sublayers // 2), attention=attention)


def state_bytes(config: ModelConfig, value_bytes: int = 2) -> int:
    """Bytes of one sequence's fixed state, whatever its length: SSM states (float32), conv windows, LSTM cells."""
    return sum(layer_state_bytes(config, spec, value_bytes) for spec in config.layers)


def layer_state_bytes(config: ModelConfig, spec: LayerSpec, value_bytes: int = 2) -> int:
    """The share of one layer in `state_bytes`."""
    ssm_bytes = max(4, value_bytes)
    match spec.mixer:
        case "mamba1":
            window = (config.mamba1.conv_kernel - 1) * config.mamba1_inner_size
            return window * value_bytes + config.mamba1_inner_size * config.mamba1.state_size * ssm_bytes
        case "mamba2":
            window = (config.mamba2.conv_kernel - 1) * config.mamba2_conv_size
            return window * value_bytes + config.mamba2_inner_size * config.mamba2.state_size * ssm_bytes
        case "attention" if config.attention.conv_kernel:
            return (config.attention.conv_kernel - 1) * config.attention_qkv_size * value_bytes
        case "s4" | "s4d" | "lssl" | "s6":
            sizes = config.ssm_block(spec.mixer)
            inner = sizes.inner_size(config.hidden_size)
            window = (sizes.conv_kernel - 1) * inner if sizes.block in ("h3", "mamba") else 0
            return window * value_bytes + inner * sizes.state_size * ssm_bytes
        case "lstm":
            return 2 * config.hidden_size * value_bytes
        case "gru":
            return config.hidden_size * value_bytes
        case _:
            return 0


def forward_bytes(config: ModelConfig, num_tokens: int, value_bytes: int = 2) -> int:
    """Bytes of what is alive at once in a forward of so many tokens without gradients, beside weights and states.

    The residual stream with what is added to it, and the layer with the widest inside: of a Mamba layer its two
    projections, the conv's output, dt and y; of an MLP gate, up and their product, of a MoE layer the same for each of
    top_k choices with their outputs; of attention q, k, v and the mixed values. The measured peak of Jamba v0.1 stays
    below it (docs/serving.md).

    Example:
        >>> from statespan.models.presets import preset
        >>> round(forward_bytes(preset("jamba-v0.1"), 8192) / 2**30, 1)
        2.1
    """
    stream = config.hidden_size * (4 + 4 + 3 * value_bytes)
    widest = max((_inner_bytes(config, spec, value_bytes) for spec in config.layers), default=0)
    return num_tokens * (stream + widest)


def _inner_bytes(config: ModelConfig, spec: LayerSpec, value_bytes: int) -> int:
    """Of one layer, a token."""
    hidden, mlp, moe = config.hidden_size, config.mlp, config.moe
    feed_forward = 0
    if spec.feed_forward == "mlp":
        feed_forward = (3 if mlp.activation in GATED else 2) * mlp.intermediate_size * value_bytes
    elif spec.feed_forward == "moe":
        choice = (3 if moe.activation in GATED else 2) * moe.intermediate_size + hidden
        feed_forward = moe.top_k * choice * value_bytes + hidden * (4 + value_bytes)
    match spec.mixer:
        case "mamba1":
            mixer = config.mamba1_inner_size * (4 * value_bytes + 2 * 4)
        case "mamba2":
            mixer = (3 * config.mamba2_inner_size + 2 * config.mamba2_conv_size) * value_bytes
        case "attention":
            mixer = 2 * config.attention_qkv_size * value_bytes
        case "s4" | "s4d" | "lssl" | "s6":
            mixer = 8 * config.ssm_block(spec.mixer).inner_size(hidden) * 4
        case _:
            mixer = 8 * hidden * value_bytes
    return max(mixer, feed_forward)
