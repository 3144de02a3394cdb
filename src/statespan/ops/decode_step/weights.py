"""What a decoding step reads: the tensors of one half of a block, by the names of its equations."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import Parameter


@dataclass(frozen=True)
class Projection:
    """A matrix with rows of outputs: [o i], or one for each of e experts [e o i]."""

    weight: Tensor  # float32, bfloat16 or int8
    scale: Tensor | None = None  # [o] or [e o] float32, of int8 weights
    bias: Tensor | None = None  # [o] or [e o]

    @property
    def plain(self) -> bool:
        """Whether the weight is an ordinary tensor; a library's packed one is for that library's own product."""
        return type(self.weight) in (Tensor, Parameter)


@dataclass(frozen=True)
class Mamba1Weights:
    """h + Mamba1(RMSNorm(h)); the shapes are those of `layers.mamba1`."""

    norm: Tensor
    norm_epsilon: float
    in_proj: Projection
    conv_weight: Tensor  # [d k]
    conv_bias: Tensor | None
    x_proj: Projection
    inner_norms: tuple[Tensor, ...]  # of dt, B and C, or none
    inner_norm_epsilon: float
    dt_proj: Projection
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor
    out_proj: Projection
    discretization: str


@dataclass(frozen=True)
class Mamba2Weights:
    """h + Mamba2(RMSNorm(h)); the shapes are those of `layers.mamba2`."""

    norm: Tensor
    norm_epsilon: float
    in_proj: Projection
    conv_weight: Tensor  # [c k]
    conv_bias: Tensor | None
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor
    state_size: int
    gate_norm: Tensor | None  # None: the gate alone
    gate_norm_epsilon: float
    gate_norm_size: int  # channels that are normalised together
    norm_before_gate: bool
    out_proj: Projection
    dt_limit: tuple[float, float]
    discretization: str


@dataclass(frozen=True)
class Router:
    """score(logits) of the top_k experts with the largest logits."""

    weight: Tensor  # [e h]
    bias: Tensor | None
    top_k: int
    score_function: str  # "softmax" or "sigmoid"
    renormalize: bool


@dataclass(frozen=True)
class FeedForwardWeights:
    """h + FeedForward(RMSNorm(h)): an MLP, or a mixture of experts where there is a router."""

    norm: Tensor
    norm_epsilon: float
    up_proj: Projection  # gated activations: the gate's rows first
    down_proj: Projection
    activation: str  # of statespan.ops.activation
    router: Router | None = None


@dataclass(frozen=True)
class HeadWeights:
    """Projection(RMSNorm(h)): the logits, of which only the first `outputs` are wanted."""

    norm: Tensor
    norm_epsilon: float
    projection: Projection
    outputs: int
