"""Models for the tests: one that follows a script, and tiny real ones of every kind."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from statespan.layers.config import (
    AttentionConfig,
    Mamba1Config,
    Mamba2Config,
    MLPConfig,
    MoEConfig,
    S4Config,
    S4DConfig,
)
from statespan.layers.state import ModelState, RecurrentState
from statespan.models.build import build
from statespan.models.config import ModelConfig
from statespan.models.language_model import LanguageModel, LanguageModelOutput
from statespan.models.layer_pattern import LayerSpec


class Bytes:
    """A byte tokenizer with an end token, 0, and a begin token, 1."""

    vocab_size, bos_id, eos_ids = 256, 1, (0,)

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(token_id for token_id in ids if token_id > 1).decode("utf-8", errors="replace")


class Scripted:
    """Says `scripts[first byte of the prompt]`, then end tokens. Its state is (first byte, bytes absorbed).

    It counts the tokens that it was fed in `fed` and checks that padding stays on the left.
    """

    def __init__(self, scripts: dict[str, bytes], prompt_size: int = 1) -> None:
        self.scripts = {ord(first): script for first, script in scripts.items()}
        self.prompt_size = prompt_size
        self.config = ModelConfig(vocab_size=256)
        self.tokenizer: Bytes | None = Bytes()
        self.training, self.device, self.fed = False, torch.device("cpu"), 0

    def new_state(self, batch_size: int) -> ModelState:
        return ModelState((RecurrentState(torch.zeros(batch_size, 2)),))

    def decoder(self, batch_size: int) -> "ScriptedDecoder":
        return ScriptedDecoder(self, batch_size)

    def __call__(
        self, ids: Tensor, *, state: ModelState, attention_mask: Tensor | None = None, logits_at: str = "all"
    ) -> LanguageModelOutput:
        real = torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else attention_mask
        self.fed += int(real.sum())
        assert torch.equal(real, real.sort(dim=1).values), "padding belongs on the left"
        hidden = state.layers[0].hidden.clone()
        logits = torch.full((len(ids), 1, 256), -10.0)
        for row in range(len(ids)):
            tokens = ids[row][real[row]].tolist()
            if tokens and hidden[row, 1] == 0:
                hidden[row, 0] = tokens[0]
            hidden[row, 1] += len(tokens)
            script = self.scripts.get(int(hidden[row, 0]), b"")
            place = int(hidden[row, 1]) - self.prompt_size
            logits[row, 0, script[place] if 0 <= place < len(script) else 0] = 10.0
        after = ModelState((RecurrentState(hidden),))
        return LanguageModelOutput(None if logits_at == "none" else logits, after, None, torch.zeros(()), ())


class ScriptedDecoder:
    """One token a row."""

    captures = False

    def __init__(self, model: Scripted, batch_size: int) -> None:
        self.model, self.batch_size = model, batch_size
        self._state: ModelState | None = None

    def start(self, state: ModelState, room: int) -> None:
        self._state = state

    def state(self) -> ModelState:
        assert self._state is not None
        return self._state

    def captured(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return run

    def __call__(self, ids: Tensor) -> Tensor:
        assert len(ids) == self.batch_size
        output = self.model(ids.unsqueeze(1), state=self.state())
        assert output.logits is not None and output.state is not None
        self._state = output.state
        return output.logits[:, -1]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from a second thread and lose much to its waiting."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def scripted() -> type[Scripted]:
    return Scripted


BASE = ModelConfig(
    vocab_size=61,
    vocab_multiple=8,
    hidden_size=24,
    mamba1=Mamba1Config(state_size=5),
    mamba2=Mamba2Config(head_dim=8, state_size=6, num_groups=2, chunk_size=4),
    attention=AttentionConfig(num_heads=4, num_kv_heads=2),
    mlp=MLPConfig(intermediate_size=20),
    moe=MoEConfig(num_experts=4, intermediate_size=12),
    tie_embeddings=False,
)

KINDS: dict[str, tuple[str, dict[str, object]]] = {
    "mamba1": ("mamba1 mamba1", {}),
    "mamba2": ("mamba2 mamba2", {}),
    "attention": ("attention attention", {"attention": AttentionConfig(num_heads=4)}),
    "rope": ("attention+mlp attention+mlp", {"attention": AttentionConfig(num_heads=4, rope_theta=50.0)}),
    "learned positions": ("attention attention", {"attention": AttentionConfig(num_heads=4, learned_positions=512)}),
    "window": (
        "attention attention+moe",
        {"attention": AttentionConfig(num_heads=4, num_kv_heads=1, rope_theta=50.0, sliding_window=5)},
    ),
    "attention with conv": ("attention mamba2", {"attention": AttentionConfig(num_heads=4, conv_kernel=3)}),
    "s4": ("s4 s4d lssl s6", {"s4": S4Config(state_size=8), "s4d": S4DConfig(state_size=6, block="mamba", expand=2)}),
    "lstm": ("lstm lstm", {}),
    "gru": ("gru gru", {}),
    "jamba": ("mamba1+mlp attention+moe mamba1+moe", {"mamba1": Mamba1Config(state_size=5, inner_norms=True)}),
    "mamba2 hybrid": ("mamba2 mlp attention mamba2+moe", {}),
}


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> LanguageModel:
    """A tiny model of every kind."""
    return tiny_model(request.param)


@pytest.fixture
def tiny() -> Callable[[str], LanguageModel]:
    return tiny_model


def tiny_model(kind: str) -> LanguageModel:
    """Its mixers weigh more than fresh ones do, so that greedy text depends on the past and does not repeat at once."""
    layers, changes = KINDS[kind]
    config = BASE.replace(layers=tuple(LayerSpec.from_text(text) for text in layers.split()), **changes)
    model = build(config, seed=5).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mixer." in name and name.endswith("weight") and "norm" not in name:
                parameter.mul_(3)
    return model
