"""ModelConfig: everything that decides a model's shape and arithmetic, frozen, checked, JSON in and out."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from statespan.dataclass_io import from_plain, to_plain
from statespan.errors import UserError
from statespan.layers.config import (
    AttentionConfig,
    LSSLConfig,
    Mamba1Config,
    Mamba2Config,
    MLPConfig,
    MoEConfig,
    RecurrentConfig,
    S4Config,
    S4DConfig,
    S6Config,
    SSMBlockConfig,
)
from statespan.models.layer_pattern import LayerSpec


@dataclass(frozen=True)
class ModelConfig:
    """A language model of the family: a backbone of layers between an embedding and a head."""

    vocab_size: int = 256
    hidden_size: int = 512
    layers: tuple[LayerSpec, ...] = (LayerSpec("mamba1"),)
    mamba1: Mamba1Config = Mamba1Config()
    mamba2: Mamba2Config = Mamba2Config()
    attention: AttentionConfig = AttentionConfig()
    s4: S4Config = S4Config()
    s4d: S4DConfig = S4DConfig()
    lssl: LSSLConfig = LSSLConfig()
    s6: S6Config = S6Config()
    recurrent: RecurrentConfig = RecurrentConfig()
    mlp: MLPConfig = MLPConfig()
    moe: MoEConfig = MoEConfig()
    norm_epsilon: float = 1e-5
    final_norm: Literal["rms", "layer"] = "rms"  # layer: LayerNorm with bias (BlackMamba)
    tie_embeddings: bool = True
    vocab_multiple: int = 1  # embedding rows are rounded up to a multiple of this
    residual_float32: bool = True  # keep the residual stream in float32
    initializer_range: float = 0.02  # standard deviation of the embedding
    activation_loss_coef: float = 0.0  # weight of mean(h^2) of the layers' outputs (Jamba-1.5)
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "vocab_multiple"):
            if getattr(self, name) < 1:
                raise UserError(f"ModelConfig.{name} must be at least 1, got {getattr(self, name)}")
        if not self.layers:
            raise UserError("ModelConfig.layers is empty; a model needs at least one layer")
        used = {spec.mixer for spec in self.layers} | {spec.feed_forward for spec in self.layers}
        if "mamba1" in used:
            _check_mamba1(self.mamba1)
        if "mamba2" in used:
            _check_mamba2(self)
        if "attention" in used:
            _check_attention(self)
        for name in ("s4", "s4d", "lssl", "s6"):
            if name in used:
                _check_ssm_block(name, self.ssm_block(name))
        if "moe" in used:
            _check_moe(self.moe)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: vocab_size rounded up to vocab_multiple."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def mamba1_inner_size(self) -> int:
        return self.mamba1.inner_size(self.hidden_size)

    @property
    def mamba1_dt_rank(self) -> int:
        return self.mamba1.rank(self.hidden_size)

    @property
    def mamba2_num_heads(self) -> int:
        return self.mamba2.heads(self.hidden_size)

    @property
    def mamba2_inner_size(self) -> int:
        return self.mamba2.inner_size(self.hidden_size)

    @property
    def mamba2_conv_size(self) -> int:
        """Channels of the conv: x, B and C."""
        return self.mamba2_inner_size + 2 * self.mamba2.num_groups * self.mamba2.state_size

    @property
    def attention_num_kv_heads(self) -> int:
        return self.attention.kv_heads()

    @property
    def attention_head_dim(self) -> int:
        return self.attention.head_size(self.hidden_size)

    @property
    def attention_qkv_size(self) -> int:
        """Rows of qkv_proj."""
        return (self.attention.num_heads + 2 * self.attention_num_kv_heads) * self.attention_head_dim

    def ssm_block(self, mixer: str) -> SSMBlockConfig:
        """The config of "s4", "s4d", "lssl" or "s6"."""
        blocks: dict[str, SSMBlockConfig] = {"s4": self.s4, "s4d": self.s4d, "lssl": self.lssl, "s6": self.s6}
        return blocks[mixer]

    def to_dict(self) -> dict[str, Any]:
        """JSON values; `from_dict` reads them back to an equal config."""
        return to_plain(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModelConfig":
        """Read JSON values; an unknown key raises UnknownName with the nearest known one."""
        return from_plain(cls, values)

    def replace(self, **changes: Any) -> "ModelConfig":
        """A copy with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)


def _check_mamba1(config: Mamba1Config) -> None:
    if min(config.expand, config.state_size, config.conv_kernel) < 1:
        raise UserError("ModelConfig.mamba1: expand, state_size and conv_kernel must be at least 1")


def _check_mamba2(config: ModelConfig) -> None:
    heads, groups = config.mamba2_num_heads, config.mamba2.num_groups
    if config.mamba2.num_heads is None and config.mamba2.expand * config.hidden_size % config.mamba2.head_dim:
        raise UserError(
            f"ModelConfig.mamba2: head_dim {config.mamba2.head_dim} must divide "
            f"expand * hidden_size = {config.mamba2.expand * config.hidden_size}"
        )
    if heads < 1 or heads % groups:
        raise UserError(f"ModelConfig.mamba2: num_groups {groups} must divide num_heads {heads}")


def _check_attention(config: ModelConfig) -> None:
    heads, kv_heads = config.attention.num_heads, config.attention_num_kv_heads
    if config.attention.head_dim is None and config.hidden_size % heads:
        raise UserError(f"ModelConfig.attention: num_heads {heads} must divide hidden_size {config.hidden_size}")
    if heads % kv_heads:
        raise UserError(f"ModelConfig.attention: num_kv_heads {kv_heads} must divide num_heads {heads}")
    size = config.attention.learned_positions
    if size is not None and size < 1:
        raise UserError(f"ModelConfig.attention: learned_positions must be at least 1, got {size}")


def _check_ssm_block(name: str, config: SSMBlockConfig) -> None:
    where = f"ModelConfig.{name}"
    if min(config.state_size, config.expand, config.conv_kernel) < 1:
        raise UserError(f"{where}: state_size, expand and conv_kernel must be at least 1")
    in_pairs = isinstance(config, S4Config) or (isinstance(config, S4DConfig) and config.init != "real")
    if in_pairs and config.state_size % 2:
        raise UserError(f"{where}: state_size {config.state_size} must be even: states come in conjugate pairs")
    if config.expand != 1 and config.block not in ("h3", "mamba"):
        raise UserError(f"{where}: expand {config.expand} needs block 'h3' or 'mamba'; {config.block!r} has no in_proj")
    if not 0 < config.dt_min <= config.dt_max:
        raise UserError(f"{where}: dt_min {config.dt_min} must be above 0 and at most dt_max {config.dt_max}")


def _check_moe(config: MoEConfig) -> None:
    if not 1 <= config.top_k <= config.num_experts:
        raise UserError(f"ModelConfig.moe: top_k {config.top_k} must be 1 to num_experts {config.num_experts}")
    if config.capacity_factor is not None and config.capacity_factor <= 0:
        raise UserError(f"ModelConfig.moe: capacity_factor must be above 0, got {config.capacity_factor}")
