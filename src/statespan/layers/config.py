"""Sizes and options of the layers: one frozen dataclass a kind of layer, each field with its unit and default."""

import math
from dataclasses import dataclass
from typing import Literal

Discretization = Literal["mamba", "zoh", "bilinear"]
Activation = Literal["swiglu", "geglu", "gelu", "relu", "silu"]


@dataclass(frozen=True)
class Mamba1Config:
    """Selective SSM mixer (Mamba, arXiv 2312.00752)."""

    expand: int = 2  # inner width / hidden_size
    state_size: int = 16  # N, states a channel
    conv_kernel: int = 4  # taps of the causal conv
    dt_rank: int | None = None  # R; None: ceil(hidden_size / 16)
    conv_bias: bool = True
    proj_bias: bool = False  # biases of in_proj and out_proj
    inner_norms: bool = False  # RMSNorm on dt, B and C (Jamba)
    dt_min: float = 1e-3  # smallest step size at initialisation
    dt_max: float = 1e-1  # largest step size at initialisation
    dt_floor: float = 1e-4  # clamp of the sampled step size
    discretization: Discretization = "mamba"

    def inner_size(self, hidden_size: int) -> int:
        """Channels of the scan."""
        return self.expand * hidden_size

    def rank(self, hidden_size: int) -> int:
        """Width of the low-rank dt."""
        return self.dt_rank or -(-hidden_size // 16)


@dataclass(frozen=True)
class Mamba2Config:
    """State-space dual mixer (Mamba-2, arXiv 2405.21060)."""

    expand: int = 2
    state_size: int = 128  # N, states a head dimension
    head_dim: int = 64  # P
    num_heads: int | None = None  # H; None: expand * hidden_size / head_dim
    num_groups: int = 1  # G, heads of a group share B and C
    conv_kernel: int = 4
    conv_bias: bool = True
    proj_bias: bool = False
    gated_norm: bool = True  # RMSNorm(y * silu(z)); False: y * silu(z)
    norm_before_gate: bool = False  # RMSNorm(y) * silu(z) instead
    norm_groups: int | None = None  # statistics groups of the gated norm; None: num_groups
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    dt_floor: float = 1e-4
    dt_limit: tuple[float, float] = (0.0, math.inf)  # clamp of dt after softplus
    A_init_range: tuple[float, float] = (1.0, 16.0)  # uniform range of -A at initialisation
    chunk_size: int = 256  # tokens a chunk of the matmul form
    discretization: Discretization = "mamba"

    def heads(self, hidden_size: int) -> int:
        """Number of heads H."""
        return self.num_heads or self.expand * hidden_size // self.head_dim

    def inner_size(self, hidden_size: int) -> int:
        """Channels H * P of the state-space part."""
        return self.heads(hidden_size) * self.head_dim


@dataclass(frozen=True)
class RopeScaling:
    """Slower rotary frequencies for contexts beyond those of pretraining (Llama 3.1, arXiv 2407.21783)."""

    factor: float = 8.0  # frequencies of long waves are divided by this
    low_freq_factor: float = 1.0  # waves longer than original_context / this are long
    high_freq_factor: float = 4.0  # waves shorter than original_context / this stay as they are
    original_context: int = 8192  # tokens of a sequence in pretraining


@dataclass(frozen=True)
class AttentionConfig:
    """Causal grouped-query attention."""

    num_heads: int = 8
    num_kv_heads: int | None = None  # None: num_heads
    head_dim: int | None = None  # None: hidden_size / num_heads
    rope_theta: float | None = None  # base of the rotary embedding; None: no positions
    rotary_dim: int | None = None  # rotated share of head_dim; None: all of it
    rotary_interleaved: bool = False  # pairs (0, 1), (2, 3) instead of halves
    rope_scaling: RopeScaling | None = None  # None: the frequencies of rope_theta
    learned_positions: int | None = None  # a trained vector for each of so many positions, added to the layer's input
    sliding_window: int | None = None  # newest keys that a query sees, itself included
    qkv_bias: bool = False
    out_bias: bool = False
    conv_kernel: int | None = None  # causal conv over q, k and v (mamba2attn); None: no conv

    def kv_heads(self) -> int:
        """Number of key and value heads."""
        return self.num_kv_heads or self.num_heads

    def head_size(self, hidden_size: int) -> int:
        """Width of one head."""
        return self.head_dim or hidden_size // self.num_heads


@dataclass(frozen=True)
class RecurrentConfig:
    """LSTM and GRU mixers, the recurrent baselines; one nn.LSTM or nn.GRU layer of hidden_size."""

    bias: bool = True


@dataclass(frozen=True)
class SSMBlockConfig:
    """What S4, S4D, LSSL and S6 share: the block round the state-space part, and its step sizes."""

    state_size: int = 64  # N, real states a channel; complex ones count twice
    # What stands round y = SSM(u): "gelu": out_proj(gelu(y)); "glu" (S4): glu(out_proj(gelu(y))); "s5": g * sigmoid(
    # out_proj(g)) with g = gelu(y); "h3": out_proj(q * SSM(conv(k) * v)); "mamba": Mamba's block with SSM for its scan.
    block: Literal["gelu", "glu", "s5", "h3", "mamba"] = "glu"
    expand: int = 1  # inner width / hidden_size of the blocks "h3" and "mamba"; 1 in the others
    conv_kernel: int = 4  # taps of the causal conv in "h3" and "mamba"
    proj_bias: bool = False  # biases of in_proj and out_proj
    dt_min: float = 1e-3  # smallest step size at initialisation
    dt_max: float = 1e-1  # largest

    def inner_size(self, hidden_size: int) -> int:
        """Channels of the state-space part."""
        return self.expand * hidden_size


@dataclass(frozen=True)
class LTIConfig(SSMBlockConfig):
    """The linear time-invariant mixers."""


@dataclass(frozen=True)
class S4Config(LTIConfig):
    """S4 mixer: diagonal plus low-rank A that starts as HiPPO-LegS, bilinear steps (arXiv 2111.00396)."""


@dataclass(frozen=True)
class S4DConfig(LTIConfig):
    """S4D mixer: diagonal A (arXiv 2206.11893)."""

    init: Literal["legs", "lin", "inv", "real"] = "lin"  # initial A; "real" has N real states instead of N/2 complex
    discretization: Literal["zoh", "bilinear"] = "zoh"


@dataclass(frozen=True)
class LSSLConfig(LTIConfig):
    """LSSL mixer with fixed A and B (arXiv 2110.13985): dense, O(N^2) a channel, to learn from and for small N."""

    state_size: int = 16
    measure: Literal["legs", "legt", "lagt"] = "legs"  # A and B are those of this HiPPO measure
    discretization: Literal["bilinear", "backward_euler", "zoh"] = "bilinear"


@dataclass(frozen=True)
class S6Config(SSMBlockConfig):
    """S6 mixer: Mamba's selective state-space model in another block (arXiv 2312.00752, table 1)."""

    state_size: int = 16
    dt_rank: int | None = None  # None: ceil(hidden_size / 16)
    dt_floor: float = 1e-4  # clamp of the sampled step size

    def rank(self, hidden_size: int) -> int:
        """Width of the low-rank dt."""
        return self.dt_rank or -(-hidden_size // 16)


@dataclass(frozen=True)
class MLPConfig:
    """Position-wise feed-forward layer."""

    intermediate_size: int = 2048
    activation: Activation = "swiglu"  # swiglu and geglu have three matrices, the others two
    bias: bool = False


@dataclass(frozen=True)
class MoEConfig:
    """Mixture of experts; the router's semantics are spelled out because the families differ."""

    num_experts: int = 8
    top_k: int = 2  # experts a token
    intermediate_size: int = 2048  # of each expert
    activation: Activation = "swiglu"
    bias: bool = False  # biases of the experts' matrices
    router_bias: bool = False
    score_function: Literal["softmax", "sigmoid"] = "softmax"
    renormalize: bool = False  # divide the chosen weights by their sum (Mixtral)
    capacity_factor: float | None = None  # tokens an expert takes / even share; None: no limit
    balancing: Literal["none", "sinkhorn"] = "none"  # how training picks experts (BlackMamba: sinkhorn)
    # Weight of each layer's load-balancing loss; the layers' losses are summed, as in Switch (arXiv 2101.03961, 2.2).
    # transformers takes one loss of all layers' tokens together: divide its router_aux_loss_coef by the MoE layers.
    load_balance_coef: float = 0.0
    router_z_coef: float = 0.0  # weight of the router z-loss
