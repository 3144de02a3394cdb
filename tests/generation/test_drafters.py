import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from statespan.checkpoints.tokenizer import ByteTokenizer, FileTokenizer
from statespan.errors import UserError
from statespan.generation import Speculation, SubwordDrafter, generate
from statespan.generation.sampling import Sampling
from statespan.generation.steps import reclaim
from statespan.generation.subwords import last_word, token_texts
from statespan.layers.state import RecurrentState
from statespan.models.build import build
from statespan.models.config import ModelConfig
from statespan.models.language_model import LanguageModelOutput
from statespan.models.layer_pattern import LayerSpec

TEXT = "the cat sat on the mat, the dog sat on the cat; and naïve cats sat. " * 3


def byte_pairs(vocab_size: int = 300) -> FileTokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([TEXT], trainer)
    return FileTokenizer(backend)


class Recites:
    """A subword model that knows one text by heart: it says the token after those that it was fed, by their number."""

    def __init__(self, tokenizer: FileTokenizer, text: str) -> None:
        self.tokenizer, self.ids = tokenizer, tokenizer.encode(text)
        self.config = ModelConfig(vocab_size=tokenizer.vocab_size)
        self.device, self.fed = torch.device("cpu"), []

    def new_state(self, batch_size):
        return _state(0)

    def decoder(self, batch_size):
        return _ReciteStep(self)

    def logits(self, place):
        logits = torch.zeros(self.config.vocab_size)
        if place < len(self.ids):
            logits[self.ids[place]] = 9.0
        return logits

    def __call__(self, ids, *, state, attention_mask=None):
        place = int(state.layers[0].hidden)
        assert ids[0].tolist() == self.ids[place : place + ids.shape[1]], "words are read as they were written"
        self.fed.append(ids.shape[1])
        after = place + ids.shape[1]
        return LanguageModelOutput(self.logits(after)[None, None], _state(after), None, torch.zeros(()), ())


class _ReciteStep:
    def __init__(self, model):
        self.model, self.place, self.captures = model, 0, False

    def captured(self, run):
        return run

    def start(self, state, room):
        self.place = int(state.layers[0].hidden)

    def __call__(self, ids):
        assert ids.tolist() == [self.model.ids[self.place]]
        self.place += 1
        return self.model.logits(self.place)[None]


def _state(place):
    from statespan.layers.state import ModelState

    return ModelState((RecurrentState(torch.tensor([[float(place)]])),))


def byte_model():
    return build(ModelConfig(vocab_size=256, hidden_size=16, layers=(LayerSpec("mamba1"),)), seed=3).eval()


def test_a_subword_drafter_writes_on_from_any_byte():
    """Cut anywhere, also inside a word or a character, the drafted bytes are the text's next ones."""
    subword = Recites(byte_pairs(), TEXT)
    drafting = SubwordDrafter(subword).begin(byte_model(), Sampling(temperature=0), [0])
    whole, found = TEXT.encode(), 0
    for cut in range(5, len(whole) - 30, 3):
        (draft,) = drafting.propose([list(whole[:cut])], [12])
        assert draft.probabilities is None and len(draft.ids) <= 12
        assert bytes(draft.ids) == whole[cut : cut + len(draft.ids)], whole[:cut]
        found += len(draft.ids)
    assert found > 8 * len(range(5, len(whole) - 30, 3))
    assert sum(subword.fed) < len(subword.ids)  # each word is read once


def test_a_subword_drafter_verified_by_a_byte_model():
    """Tokens of the byte model stay what they are, whatever a subword model drafts."""
    tokenizer = byte_pairs()
    subword = build(ModelConfig(vocab_size=tokenizer.vocab_size, hidden_size=16, layers=(LayerSpec("mamba2+mlp"),) * 2))
    subword.tokenizer = tokenizer
    model, prompts = byte_model(), [list(b"the cat s"), list(b"on"), list("na\u00efve".encode()[:3])]
    options = {"max_new_tokens": 25, "temperature": 0.8, "seed": 1, "ignore_eos": True}
    plain = generate(model, prompts, **options)
    fast = generate(model, prompts, speculation=Speculation(SubwordDrafter(subword), 8, False), **options)
    assert [one.token_ids for one in fast] == [one.token_ids for one in plain]
    assert fast[0].speculation.drafted > 0


def test_words_and_the_text_of_tokens():
    assert [last_word(text) for text in (b"", b"one", b"one two", b"one two ", b"one  two", b"a\n  b")] == [
        0,
        0,
        3,
        3,
        3,
        1,
    ]
    tokenizer = byte_pairs()
    texts = token_texts(tokenizer, tokenizer.vocab_size)
    assert texts == sorted(texts) and b"" not in dict(texts)
    for text, token in texts:
        assert tokenizer.backend.decode([token]).encode() == text
    assert 0 not in {token for _, token in texts}  # the special one
    stored = json.loads(tokenizer.backend.to_str())["model"]["vocab"]
    assert dict(texts)[b" cat"] == stored["\u0120cat"]


def test_a_subword_drafter_is_for_bytes_and_needs_a_tokenizer():
    subword = build(ModelConfig(vocab_size=300, hidden_size=16, layers=(LayerSpec("mamba1"),)))
    with pytest.raises(UserError, match="no tokenizer"):
        SubwordDrafter(subword).begin(byte_model(), Sampling(), [0])
    with pytest.raises(UserError, match="byte-level"):
        SubwordDrafter(subword, ByteTokenizer()).begin(subword, Sampling(), [0])


def test_reclaimed_caches_grow_in_place(tiny):
    model = tiny("attention")
    with torch.inference_mode():
        state = model(torch.tensor([[1, 2, 3]]), state=model.new_state(1)).state
        buffers = set()
        for token in range(5):
            reclaim(state)
            buffers.add(model(torch.tensor([[token]]), state=state).state.layers[0].key.data_ptr())
        assert buffers == {state.layers[0].key.data_ptr()}
        again = model(torch.tensor([[4, 5]]), state=state).logits
        whole = model(torch.tensor([[1, 2, 3, 4, 5]])).logits[:, 3:]
    torch.testing.assert_close(again, whole, atol=1e-5, rtol=1e-4)
