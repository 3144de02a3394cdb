"""LanguageModel: an embedding, a Backbone and a head, with one forward for training, prefill and decode."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook  # pyright: ignore[reportPrivateUsage]  # no other name

from statespan.errors import UserError
from statespan.layers.linear import Int8Linear, Linear, projection_of
from statespan.layers.norm import RMSNorm
from statespan.layers.routing import RouterMetrics
from statespan.layers.state import ModelState, SSMState, State
from statespan.models.backbone import Backbone, Block
from statespan.models.capture import weakly
from statespan.models.config import ModelConfig
from statespan.models.decoder import Decoder
from statespan.models.prefill import Prefiller, capturable
from statespan.models.verify_step import NoVerifyStep, VerifyDecoder
from statespan.ops import linear, linear_cross_entropy
from statespan.ops.decode_step import HeadWeights, Projection
from statespan.ops.tied_embedding import tied_embedding


class Tokenizer(Protocol):
    """What a model needs of its tokenizer."""

    vocab_size: int
    bos_id: int | None
    eos_ids: tuple[int, ...]

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...

    def save(self, directory: Path) -> None: ...


@dataclass(frozen=True)
class LanguageModelOutput:
    """What a forward returns."""

    logits: Tensor | None  # [b t v]; None when labels were given or logits_at="none"
    state: ModelState | None  # the state after the last token, when a state was given
    loss: Tensor | None  # scalar float32, mean cross entropy of the next token, when labels were given
    aux_loss: Tensor  # scalar float32, weighted sum of the routers' and the activation loss; add it to loss in training
    router: tuple[RouterMetrics, ...]  # one a MoE layer


class LanguageModel(nn.Module):
    """A causal language model of the Mamba and Jamba family, described by its config alone.

    Example:
        >>> import statespan, torch
        >>> model = statespan.build("jamba-tiny", seed=0)
        >>> ids = torch.randint(0, model.config.vocab_size, (1, 8))
        >>> whole = model(ids).logits
        >>> first = model(ids[:, :5], state=model.new_state(1))
        >>> rest = model(ids[:, 5:], state=first.state)
        >>> torch.allclose(whole[:, 5:], rest.logits, atol=1e-4)
        True
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.tokenizer: Tokenizer | None = None
        self._forms: dict[torch.dtype, list[tuple[list[int], SSMState]]] = {}  # of the Mamba mixers' states
        self.embedding = nn.Embedding(config.padded_vocab_size, config.hidden_size)
        self.backbone = Backbone(config)
        if config.final_norm == "rms":
            self.final_norm = RMSNorm(config.hidden_size, config.norm_epsilon)
        else:
            self.final_norm = nn.LayerNorm(config.hidden_size, eps=config.norm_epsilon)
        self.lm_head: Linear | Int8Linear | None = None
        if not config.tie_embeddings:
            self.lm_head = Linear(config.hidden_size, config.padded_vocab_size, bias=False)

    @property
    def layers(self) -> list[Block]:
        """The blocks in order."""
        return list(self.backbone.layers)  # type: ignore[arg-type]  # the ModuleList holds Blocks only

    @property
    def head_weight(self) -> Tensor:
        """[padded vocabulary, hidden]: the head's matrix, the embedding's where they are tied."""
        return self.embedding.weight if self.lm_head is None else self.lm_head.weight

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    @property
    def stream_dtype(self) -> torch.dtype:
        """Of the residual stream: the weights', or at least float32 with residual_float32."""
        return torch.promote_types(self.dtype, torch.float32) if self.config.residual_float32 else self.dtype

    def forward(
        self,
        input_ids: Tensor,
        *,
        segments: Tensor | None = None,
        attention_mask: Tensor | None = None,
        state: ModelState | None = None,
        labels: Tensor | None = None,
        logits_at: Literal["all", "last", "none"] = "all",
    ) -> LanguageModelOutput:
        """Next-token logits, or the loss when labels are given (the full logits are then never held).

        Args:
            input_ids: [b t] int64 in [0, vocab_size).
            segments: [b t] int; the model restarts where the number changes, a negative number is padding.
            attention_mask: [b t], 0 marks padding, anywhere in a row.
            state: from `new_state` or an earlier output; the tokens continue it. It is not changed.
            labels: [b t] int64, usually input_ids; token t is predicted from the tokens before it in its segment.
                -100 and padding do not count.
            logits_at: "last" gives logits [b 1 v] of each row's last real token only.
        Returns:
            LanguageModelOutput.
        Raises:
            UserError: shapes or devices disagree, a token id is out of range, or the state belongs to another model.
        """
        self._check(input_ids, segments, attention_mask, labels, state)
        if attention_mask is not None:
            segments = torch.zeros_like(input_ids) if segments is None else segments
            segments = segments.masked_fill(attention_mask == 0, -1)
        hidden, head_weight = self._embed(input_ids, labels is not None)
        hidden, state, router, activation = self.backbone(hidden, state, segments)
        aux_loss = self._aux_loss(router, activation)
        loss = logits = None
        if labels is not None:
            normed = self.normed(hidden)
            loss = self._loss(normed, self.head_weight if head_weight is None else head_weight, labels, segments)
        elif logits_at != "none":
            logits = self.head(hidden if logits_at == "all" else last_real(hidden, segments))
        return LanguageModelOutput(logits, state, loss, aux_loss, router)

    def normed(self, hidden: Tensor) -> Tensor:
        """The residual stream [.. h] after the last layer, through the last norm [.. h]."""
        if isinstance(self.final_norm, nn.LayerNorm):
            return self.final_norm(hidden.to(self.final_norm.weight.dtype))
        return self.final_norm(hidden)

    def head(self, hidden: Tensor) -> Tensor:
        """The residual stream [.. h] after the last layer -> logits [.. v]."""
        hidden = self.normed(hidden)
        logits = linear(hidden, self.embedding.weight) if self.lm_head is None else self.lm_head(hidden)
        return logits[..., : self.config.vocab_size]

    def _embed(self, input_ids: Tensor, with_head: bool) -> tuple[Tensor, Tensor | None]:
        """The tokens' rows [b t h] of the residual stream, and a tied head's matrix for the loss, where it is one."""
        head = None
        if with_head and self.lm_head is None and _only_looks_up(self.embedding):
            rows, head = tied_embedding(input_ids, self.embedding.weight)
        else:
            rows = self.embedding(input_ids)
        return rows.to(self.stream_dtype), head

    def _loss(self, hidden: Tensor, head_weight: Tensor, labels: Tensor, segments: Tensor | None) -> Tensor:
        targets = labels[:, 1:]
        if segments is not None:
            follows = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] >= 0)
            targets = targets.masked_fill(~follows, -100)
        if hidden.is_cuda:  # there tokens that do not count are computed too: taking the last ones along spares a copy
            targets = F.pad(targets, (0, 1), value=-100)
        else:
            hidden = hidden[:, :-1]
        return linear_cross_entropy(hidden, head_weight, targets, valid_vocab_size=self.config.vocab_size)

    def _aux_loss(self, router: tuple[RouterMetrics, ...], activation: Tensor) -> Tensor:
        moe, total = self.config.moe, self.config.activation_loss_coef * activation.float()
        for metrics in router:
            if moe.load_balance_coef:
                total = total + moe.load_balance_coef * metrics.load_balance_loss
            if moe.router_z_coef:
                total = total + moe.router_z_coef * metrics.router_z_loss
        return total

    def new_state(self, batch_size: int) -> ModelState:
        """The state before the first token, for `batch_size` rows."""
        layers = self._mamba_states(batch_size) if self.device.type == "cuda" else {}
        for index, block in enumerate(self.layers):
            if block.mixer is not None and index not in layers:
                layers[index] = block.mixer.new_state(batch_size, self.device, self.dtype)
        return ModelState(tuple(map(layers.get, range(len(self.backbone.layers)))))

    def _mamba_states(self, batch_size: int) -> dict[int, State]:
        """New states of the Mamba mixers by layer: two tensors for all of a form, so two launches."""
        if self.dtype not in self._forms:
            self._forms[self.dtype] = _forms(self.layers, self.dtype)
        layers: dict[int, State] = {}
        for indices, form in self._forms[self.dtype]:
            parts = (
                torch.zeros(len(indices), batch_size, *part.shape[1:], dtype=part.dtype, device=self.device).unbind()
                for part in (form.conv, form.ssm)
            )
            layers |= {index: SSMState(conv, ssm) for index, conv, ssm in zip(indices, *parts, strict=True)}
        return layers

    def decoder(self, batch_size: int, *, memory: ModelState | None = None, active: Tensor | None = None) -> Decoder:
        """A fast form of `model(ids[:, None], state=)` for generation: see Decoder."""
        return Decoder(*self._decoder_parts(), batch_size, self.stream_dtype, memory, active)

    def verify_decoder(
        self, num_rows: int, num_tokens: int, *, memory: ModelState, kept: ModelState, active: Tensor
    ) -> VerifyDecoder | None:
        """Several tokens of each row at once, for speculation: see VerifyDecoder; None where there is none."""
        try:
            return VerifyDecoder(*self._decoder_parts(), num_rows, num_tokens, self.stream_dtype, memory, kept, active)
        except NoVerifyStep:
            return None

    def prefiller(self, batch_size: int) -> Prefiller | None:
        """Chunks of prompts as CUDA graphs: see Prefiller; None where there are none."""
        if self.device.type != "cuda" or not all(map(capturable, self.layers)):
            return None
        return Prefiller(self.embedding, self.backbone, self.stream_dtype, self.new_state(batch_size))

    def _decoder_parts(
        self,
    ) -> tuple[nn.Embedding, Sequence[Block], Callable[[Tensor], Tensor], HeadWeights | None]:
        return self.embedding, self.layers, weakly(self.head), self._head_weights()

    def _head_weights(self) -> HeadWeights | None:
        """What a prepared decoding step of the head reads; None where the last norm is no RMSNorm."""
        if not isinstance(self.final_norm, RMSNorm):
            return None
        projection = Projection(self.embedding.weight) if self.lm_head is None else projection_of(self.lm_head)
        return HeadWeights(self.final_norm.weight, self.final_norm.epsilon, projection, self.config.vocab_size)

    def save(self, directory: str | Path, format: Literal["statespan", "transformers"] = "statespan") -> None:
        """Write config, safetensors and tokenizer to `directory`; "transformers" writes files that it can load."""
        from statespan.checkpoints import save

        save(self, directory, format=format)

    def _check(
        self,
        input_ids: Tensor,
        segments: Tensor | None,
        attention_mask: Tensor | None,
        labels: Tensor | None,
        state: ModelState | None,
    ) -> None:
        if input_ids.dim() != 2 or input_ids.shape[1] == 0:
            raise UserError(f"input_ids must be [batch, time] with at least one token, got {list(input_ids.shape)}")
        if input_ids.dtype not in (torch.int64, torch.int32):
            raise UserError(f"input_ids must be int64 or int32, got {input_ids.dtype}; use input_ids.long()")
        beside = (("segments", segments), ("attention_mask", attention_mask), ("labels", labels))
        for name, value in beside:
            if value is not None and value.shape != input_ids.shape:
                raise UserError(f"{name} is {list(value.shape)} and input_ids {list(input_ids.shape)}; they must agree")
        if torch.compiler.is_compiling():
            return
        for name, value in (("input_ids", input_ids), *beside):
            if value is not None and value.device != self.device:
                raise UserError(
                    f"{name} is on {value.device} and the model on {self.device}; use {name}.to(model.device)"
                )
        if input_ids.device.type == "cpu":  # elsewhere the check would wait for the device
            low, high = int(input_ids.min()), int(input_ids.max())
            if low < 0 or high >= self.config.vocab_size:
                bad = low if low < 0 else high
                raise UserError(f"token id {bad} is out of range; the vocabulary is 0 to {self.config.vocab_size - 1}")
        if state is not None:
            self.check_state(state, input_ids.shape[0])

    def check_state(self, state: ModelState, batch_size: int) -> None:
        """Raise UserError for a state that this model cannot have made, or of another batch."""
        remedy = "it comes from another model: make one with model.new_state(batch_size)"
        expected = self._state_kinds
        if len(state.layers) != len(expected):
            raise UserError(f"state has {len(state.layers)} layers and the model {len(expected)}; {remedy}")
        for index, (layer, kind) in enumerate(zip(state.layers, expected, strict=True)):
            if layer is None or kind is None:
                if layer is not kind:
                    raise UserError(f"state of layer {index} should be {'absent' if kind is None else kind}; {remedy}")
            elif (layer.kind, layer.row_shape) != kind:
                have, want = f"{type(layer).__name__} {layer.row_shape}", f"{kind[0].__name__} {kind[1]}"
                raise UserError(f"state of layer {index} is {have} a row, the model's is {want}; {remedy}")
        if any(expected) and state.batch_size != batch_size:
            raise UserError(f"state has {state.batch_size} rows and input_ids {batch_size}; they must agree")

    @cached_property
    def _state_kinds(self) -> list[tuple[type[State], tuple[int, ...]] | None]:
        """Type and row shape of each layer's state."""
        layers = self.new_state(0).layers
        return [None if layer is None else (layer.kind, layer.row_shape) for layer in layers]


def _only_looks_up(embedding: nn.Embedding) -> bool:
    """Whether a call of it is weight[ids] and nothing else, so that nobody misses it."""
    own = vars(embedding)
    hooks = (own[f"_{place}_hooks"] for place in ("forward_pre", "forward", "backward_pre", "backward"))
    if type(embedding) is not nn.Embedding or "forward" in own or any(hooks) or _has_any_global_hook():
        return False
    limits = (embedding.padding_idx, embedding.max_norm)
    return limits == (None, None) and not embedding.scale_grad_by_freq and not embedding.sparse


def _forms(blocks: Sequence[Block], dtype: torch.dtype) -> list[tuple[list[int], SSMState]]:
    """The layers whose states are zeros of one form, and one such state."""
    found: dict[tuple[Any, ...], tuple[list[int], SSMState]] = {}
    for index, block in enumerate(blocks):
        state = None if block.mixer is None else block.mixer.new_state(1, torch.device("meta"), dtype)
        if isinstance(state, SSMState):
            key = state.conv.shape, state.conv.dtype, state.ssm.shape, state.ssm.dtype
            found.setdefault(key, ([], state))[0].append(index)
    return list(found.values())


def last_real(hidden: Tensor, segments: Tensor | None) -> Tensor:
    """[b 1 h]: `hidden` at each row's last token that is not padding (the last of all where a row is padding)."""
    if segments is None:
        return hidden[:, -1:]
    place = torch.arange(segments.shape[1], device=segments.device)
    last = torch.where(segments >= 0, place, -1).amax(dim=1) % segments.shape[1]
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), last].unsqueeze(1)
