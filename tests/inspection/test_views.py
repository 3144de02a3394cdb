"""What layers of every kind show of a text, against the model's own forward and float64 loops."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from statespan.errors import UserError
from statespan.inspection import hidden_attention, layer_view, observe, selection_of, token_view
from statespan.inspection.observation import HEAD_TOKENS, log_probabilities
from statespan.inspection.tokens import token_texts
from statespan.inspection.views import attention_map, evenly_spaced
from statespan.layers.attention import Attention
from statespan.layers.config import AttentionConfig
from statespan.layers.moe import MoE
from statespan.layers.s4 import LTIMixer
from statespan.models.language_model import LanguageModel

IDS = torch.tensor([72, 101, 108, 108, 111, 32, 119, 111, 114, 108, 100, 33, 10])


def inputs_by_hooks(model: LanguageModel, ids: Tensor) -> dict[int, Tensor]:
    """What each mixer reads in the model's own forward."""
    seen: dict[int, Tensor] = {}
    handles = [
        block.mixer.register_forward_pre_hook(lambda _, args, index=index: seen.update({index: args[0]}))
        for index, block in enumerate(model.layers)
        if block.mixer is not None
    ]
    model(ids.unsqueeze(0))
    for handle in handles:
        handle.remove()
    return seen


def test_an_observation_is_the_models_own_forward(model: LanguageModel) -> None:
    with torch.no_grad():
        observation, seen = observe(model, IDS), inputs_by_hooks(model, IDS)
        output = model(IDS.unsqueeze(0))
        assert observation.mixer_inputs.keys() == seen.keys()
        for index, hidden in seen.items():
            torch.testing.assert_close(observation.mixer_inputs[index], hidden, rtol=0, atol=0)
        torch.testing.assert_close(model.head(observation.hidden), output.logits, rtol=0, atol=0)
    assert list(observation.routers) == [0, 2]
    for metrics, theirs in zip(observation.routers.values(), output.router, strict=True):
        assert torch.equal(metrics.chosen, theirs.chosen)
    assert list(observe(model, IDS, layers=[3]).mixer_inputs) == [3]


def test_log_probabilities_are_those_of_the_logits(model: LanguageModel) -> None:
    ids = torch.randint(0, 256, (2 * HEAD_TOKENS + 3,))  # more than are held at a time
    found = log_probabilities(model, observe(model, ids))
    with torch.no_grad():
        logits = model(ids.unsqueeze(0)).logits[0].numpy()
    assert math.isnan(found[0])
    for t in range(1, len(ids)):
        row = logits[t - 1]
        expected = row[ids[t]] - row.max() - np.log(np.exp(row - row.max()).sum())
        assert float(found[t]) == pytest.approx(expected, rel=1e-12)
    assert len(log_probabilities(model, observe(model, ids[:1]))) == 1


def test_a_training_model_is_seen_in_evaluation_and_trains_on(model: LanguageModel) -> None:
    moe = model.layers[0].feed_forward
    assert isinstance(moe, MoE)
    expected = token_view(model, IDS, 0)
    model.train()
    moe.experts.eval()  # one part was left out of training
    try:
        assert token_view(model, IDS, 0) == expected
        assert model.training and moe.training and not moe.experts.training
    finally:
        model.eval()


def test_experts_are_the_largest_of_the_routers_scores(model: LanguageModel) -> None:
    view, moe = layer_view(model, observe(model, IDS), 2), model.layers[2].feed_forward
    assert isinstance(moe, MoE) and view.experts is not None and view.scores is not None
    seen: list[Tensor] = []
    handle = moe.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(IDS.unsqueeze(0))
    handle.remove()
    logits = seen[0][0].numpy() @ moe.router.weight.detach().numpy().T
    scores = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(view.scores.numpy(), scores, rtol=1e-9)
    np.testing.assert_array_equal(view.experts.numpy(), np.argsort(-scores, axis=1)[:, :2])


ATTENTION = {
    "plain": AttentionConfig(num_heads=3),
    "grouped, rope": AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=6, rope_theta=50.0, qkv_bias=True),
    "window": AttentionConfig(num_heads=2, num_kv_heads=1, rope_theta=50.0, sliding_window=4),
    "conv": AttentionConfig(num_heads=2, conv_kernel=3),
}


@pytest.mark.parametrize("kind", ATTENTION)
def test_attention_maps_are_the_weights_of_the_layer(kind: str) -> None:
    """Times the values, the maps give the layer's output; they are causal and each row sums to 1."""
    config = ATTENTION[kind]
    mixer = Attention(12, config).double()
    hidden = torch.randn(1, 11, 12, dtype=torch.float64)
    weights = attention_map(mixer, hidden)
    assert torch.equal(weights, weights.tril())
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    if config.sliding_window:
        assert torch.count_nonzero(weights.tril(-config.sliding_window)) == 0
    with torch.no_grad():
        _, _, value, _ = mixer._project(hidden, None, None)
        value = value[0].repeat_interleave(config.num_heads // config.kv_heads(), dim=1)
        output = mixer.out_proj(torch.einsum("hts,shp->thp", weights, value).flatten(1))
        torch.testing.assert_close(output, mixer(hidden)[0][0], rtol=1e-9, atol=1e-12)


def test_attention_maps_are_the_softmax_of_the_scores() -> None:
    mixer = Attention(8, AttentionConfig(num_heads=2)).double()
    hidden = torch.randn(1, 7, 8, dtype=torch.float64)
    weights = attention_map(mixer, hidden)
    query, key, _ = (hidden[0] @ mixer.qkv_proj.weight.T).detach().view(7, 3, 2, 4).unbind(1)
    for head in range(2):
        for t in range(7):
            scores = [math.exp(float(query[t, head] @ key[s, head]) / 2) for s in range(t + 1)]
            expected = torch.tensor(scores, dtype=torch.float64) / sum(scores)
            torch.testing.assert_close(weights[head, t, : t + 1], expected)


@pytest.mark.parametrize("index", [3, 4, 5])
def test_lti_layers_show_their_impulse_response_and_their_decay(model: LanguageModel, index: int) -> None:
    """An impulse is sent through the recurrence; a free state falls by its eigenvalues."""
    mixer = model.layers[index].mixer
    assert isinstance(mixer, LTIMixer)
    view = layer_view(model, observe(model, IDS), index, num_channels=1000)
    assert view.dt is None and view.mixing is not None and view.memory is not None
    with torch.no_grad():
        system, state = mixer.system(), None
        responses = []
        for t in range(len(IDS)):
            u = torch.full((1, 16), float(t == 0), dtype=torch.float64)
            state = torch.zeros(1, *system.B.shape, dtype=system.B.dtype) if state is None else state
            y, state = system.step(state, u)
            responses.append(y[0].abs().mean())
    for t in range(len(IDS)):
        for s in range(len(IDS)):
            expected = responses[t - s] if s <= t else torch.zeros((), dtype=torch.float64)
            torch.testing.assert_close(view.mixing[0, t, s], expected, rtol=1e-8, atol=1e-12)
    dense = system.dense().A if index == 3 else system.A
    for matrix, longest in zip(dense, view.memory.amax(1).tolist(), strict=True):
        matrix, steps = torch.diag(matrix) if matrix.dim() == 1 else matrix, 200 * math.ceil(longest)
        # After so many steps only the slowest state of a channel is left, which falls on at its own pace.
        early, late = (torch.linalg.matrix_norm(torch.linalg.matrix_power(matrix, n), 2) for n in (steps, 2 * steps))
        assert -steps / float((late / early).detach().log()) == pytest.approx(longest, rel=1e-2)


def test_what_has_no_such_thing_says_so(model: LanguageModel) -> None:
    observation = observe(model, IDS)
    lstm, mlp = layer_view(model, observation, 6), layer_view(model, observation, 7)
    assert (lstm.dt, lstm.memory, lstm.mixing, lstm.experts) == (None,) * 4
    assert lstm.note == "it has neither a step size nor an attention matrix: its state passes gates"
    assert (mlp.dt, mlp.memory, mlp.mixing, mlp.note) == (None, None, None, "")


def test_the_mean_over_channels_does_not_depend_on_how_many_are_held(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    observation = observe(model, IDS)
    views = []
    for at_once in (1, 3, 1000):
        monkeypatch.setattr("statespan.inspection.views.CHANNELS_AT_ONCE", at_once)
        views.append(layer_view(model, observation, 0, num_channels=7).mixing)
    torch.testing.assert_close(views[0], views[1], rtol=1e-12, atol=0)
    torch.testing.assert_close(views[0], views[2], rtol=1e-12, atol=0)
    selection = selection_of(model.layers[0].mixer, observation.mixer_inputs[0])
    alone = hidden_attention(selection, evenly_spaced(32, 7)).abs().mean(0)
    torch.testing.assert_close(views[0][0], alone, rtol=1e-12, atol=0)
    assert evenly_spaced(32, 4) == [0, 8, 16, 24]
    assert evenly_spaced(3, 10) == [0, 1, 2]


def test_a_token_view_is_the_views_in_short(model: LanguageModel) -> None:
    observation = observe(model, IDS)
    for index in range(len(model.layers)):
        short, view = token_view(model, IDS.tolist(), index), layer_view(model, observation, index)
        assert (short.dt is None, short.experts is None) == (view.dt is None, view.experts is None)
        if view.dt is not None:
            assert short.dt == pytest.approx([sum(row) / len(row) for row in view.dt.tolist()], rel=1e-12)
        if view.experts is not None:
            assert short.experts == tuple(map(tuple, view.experts.tolist()))
        assert short.logprobs[0] is None
        assert short.logprobs[1:] == tuple(log_probabilities(model, observation)[1:].tolist())


@pytest.mark.parametrize(
    ("ids", "layer", "message"),
    [
        ([], 0, "ids must be one text of at least one token, got the shape [0]"),
        ([1, 256], 0, "token id 256 is out of range; the vocabulary is 0 to 255"),
        ([1, -2], 0, "token id -2 is out of range"),
        ([1], 8, "the model has no layer 8; its layers are 0 to 7"),
        ([1], -1, "the model has no layer -1"),
    ],
)
def test_bad_input_is_one_line(model: LanguageModel, ids: list[int], layer: int, message: str) -> None:
    with pytest.raises(UserError) as error:
        token_view(model, ids, layer)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_texts_of_tokens_join_to_the_text(model: LanguageModel) -> None:
    assert model.tokenizer is not None
    text = "né 数"
    pieces = token_texts(model.tokenizer, model.tokenizer.encode(text))
    assert pieces == ["n", "", "é", " ", "", "", "数"]
    assert "".join(token_texts(model.tokenizer, [65, 0xC3])) == "A\ufffd"  # cut in a character
