"""Pure tensor functions, each with a reference, a fast CPU form and gradients; see docs/architecture.md."""

from statespan.ops.causal_conv1d import causal_conv1d, causal_conv1d_update
from statespan.ops.decode_attention import decode_attention
from statespan.ops.decode_attention.paged import paged_decode_attention
from statespan.ops.grouped_mlp import grouped_mlp
from statespan.ops.linear import linear, quantize_rows
from statespan.ops.linear_cross_entropy import linear_cross_entropy
from statespan.ops.mamba1_block import mamba1_block
from statespan.ops.mamba2_block import mamba2_block
from statespan.ops.rms_norm import gated_rms_norm, rms_norm
from statespan.ops.sampling_edge import sampling_edge
from statespan.ops.selective_scan import selective_scan
from statespan.ops.ssd import ssd
from statespan.ops.state_update import selective_state_update, ssd_state_update

__all__ = [
    "causal_conv1d",
    "causal_conv1d_update",
    "decode_attention",
    "gated_rms_norm",
    "grouped_mlp",
    "linear",
    "linear_cross_entropy",
    "mamba1_block",
    "mamba2_block",
    "paged_decode_attention",
    "quantize_rows",
    "rms_norm",
    "sampling_edge",
    "selective_scan",
    "selective_state_update",
    "ssd",
    "ssd_state_update",
]
