"""The language model as a whole: chunks, padding, packing, loss, initial values, bad input."""

import math

import pytest
import torch
from torch.nn import functional as F

from statespan.errors import UserError
from statespan.layers.config import AttentionConfig, Mamba1Config, Mamba2Config, MLPConfig, MoEConfig
from statespan.models.build import build
from statespan.models.config import ModelConfig
from statespan.models.language_model import LanguageModel
from statespan.models.layer_pattern import LayerSpec

SMALL = ModelConfig(
    vocab_size=61,
    vocab_multiple=8,
    hidden_size=32,
    mamba1=Mamba1Config(inner_norms=True),
    mamba2=Mamba2Config(head_dim=16, state_size=12, chunk_size=8),
    attention=AttentionConfig(num_heads=4, num_kv_heads=2),
    mlp=MLPConfig(intermediate_size=40),
    moe=MoEConfig(num_experts=4, intermediate_size=24, load_balance_coef=0.01, router_z_coef=0.001),
)


def small(*layers: str, **changes: object) -> LanguageModel:
    config = SMALL.replace(layers=tuple(LayerSpec.from_text(text) for text in layers), **changes)
    return build(config, seed=1).eval()


HYBRID = ("mamba1+mlp", "attention+moe", "mamba2+moe", "mlp")


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(0, SMALL.vocab_size, shape)


@pytest.mark.parametrize("tied", [True, False])
def test_chunks_equal_whole(tied: bool) -> None:
    model, tokens = small(*HYBRID, tie_embeddings=tied), ids(3, 17)
    whole = model(tokens).logits
    state, parts = model.new_state(3), []
    with torch.no_grad():
        for piece in tokens.split([5, 1, 1, 7, 3], dim=1):
            output = model(piece, state=state)
            state = output.state
            parts.append(output.logits)
    assert whole.shape == (3, 17, 61)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_equal_each_row_alone(side: str) -> None:
    model, lengths = small(*HYBRID), [4, 9, 1]
    rows = [ids(1, length) for length in lengths]
    tokens, mask = torch.zeros(3, 9, dtype=torch.int64), torch.zeros(3, 9, dtype=torch.int64)
    for i, row in enumerate(rows):
        place = slice(0, lengths[i]) if side == "right" else slice(9 - lengths[i], 9)
        tokens[i, place], mask[i, place] = row[0], 1
    output = model(tokens, attention_mask=mask, state=model.new_state(3), logits_at="last")
    after = model(ids(1, 2).expand(3, 2), state=output.state)
    for i, row in enumerate(rows):
        alone = model(row, state=model.new_state(1))
        torch.testing.assert_close(output.logits[i, 0], alone.logits[0, -1], rtol=1e-4, atol=1e-4)
        again = model(ids(1, 2), state=alone.state)
        assert again.logits.shape == after.logits[i : i + 1].shape
    follow = ids(3, 2)
    together = model(follow, state=output.state).logits
    for i, row in enumerate(rows):
        alone = model(follow[i : i + 1], state=model(row, state=model.new_state(1)).state).logits
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-4)


def test_packed_loss_equals_separate_documents() -> None:
    model = small(*HYBRID)
    documents = [ids(1, 6), ids(1, 2), ids(1, 9)]
    tokens = torch.cat([*documents, ids(1, 3)], dim=1)
    segments = torch.tensor([[0] * 6 + [1] * 2 + [2] * 9 + [-1] * 3])
    packed = model(tokens, segments=segments, labels=tokens)
    total = sum(F.cross_entropy(model(d).logits[0, :-1], d[0, 1:], reduction="sum") for d in documents)
    torch.testing.assert_close(packed.loss, total / (5 + 1 + 8), rtol=1e-5, atol=1e-5)
    assert packed.logits is None


def test_loss_and_its_gradients_equal_those_of_the_logits() -> None:
    model, tokens = small(*HYBRID), ids(2, 10)
    labels = tokens.clone()
    labels[0, 4] = -100
    model(tokens, labels=labels).loss.backward()
    fused = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    F.cross_entropy(model(tokens).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(fused[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_aux_loss_is_the_weighted_sum() -> None:
    model, tokens = small("mamba1+moe", "attention+moe", activation_loss_coef=0.5), ids(2, 6)
    output = model(tokens)
    assert len(output.router) == 2
    hidden, squares = model.embedding(tokens), []
    for layer in model.layers:
        hidden = sum(layer(hidden)[:2])  # the stream, and what is to be added to it
        squares.append(hidden.pow(2).mean())
    expected = 0.5 * sum(squares) / 2
    expected = expected + sum(0.01 * r.load_balance_loss + 0.001 * r.router_z_loss for r in output.router)
    torch.testing.assert_close(output.aux_loss, expected)


def test_initial_values() -> None:
    model = small(*HYBRID).requires_grad_(False)
    mamba1, mamba2 = model.layers[0].mixer, model.layers[2].mixer
    torch.testing.assert_close(mamba1.A_log.exp(), torch.arange(1.0, 17).expand(64, 16))
    assert bool((mamba2.A_log.exp() >= 1).all()) and bool((mamba2.A_log.exp() <= 16).all())
    for mixer in (mamba1, mamba2):
        step = F.softplus(mixer.dt_bias)
        assert step.min() > 0.9e-3 and step.max() < 0.11
        assert torch.equal(mixer.D, torch.ones_like(mixer.D))
    wide = build(SMALL.replace(hidden_size=512, layers=(LayerSpec("mamba1"),) * 4), seed=0)
    wide.requires_grad_(False)
    mixer = wide.layers[0].mixer
    assert math.isclose(mixer.in_proj.weight.std(), 512**-0.5 / 3**0.5, rel_tol=0.02)
    assert math.isclose(mixer.out_proj.weight.std(), 1024**-0.5 / 3**0.5 / 2, rel_tol=0.02)
    assert math.isclose(wide.embedding.weight.std(), 0.02, rel_tol=0.02)
    log_step = F.softplus(mixer.dt_bias).log()
    assert math.isclose(log_step.mean(), (math.log(1e-3) + math.log(1e-1)) / 2, rel_tol=0.05)  # log-uniform


def test_a_generic_reinitialisation_leaves_dt_bias_alone() -> None:
    model = small(*HYBRID)
    before = model.layers[0].mixer.dt_bias.clone()

    def reset(module: torch.nn.Module) -> None:
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight)
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)

    model.apply(reset)
    assert torch.equal(model.layers[0].mixer.dt_bias, before)


def test_same_seed_same_weights_and_float32_parameters() -> None:
    first, second, other = small(*HYBRID), small(*HYBRID), build(small(*HYBRID).config, seed=2)
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(first.embedding.weight, other.embedding.weight)
    half = build(first.config, seed=1, dtype=torch.bfloat16)
    for name, parameter in half.named_parameters():
        kept = name.endswith(("A_log", ".D", "dt_bias"))
        assert parameter.dtype == (torch.float32 if kept else torch.bfloat16), name
        assert torch.equal(parameter, first.get_parameter(name).to(parameter.dtype)), name


def test_bfloat16_is_near_float32() -> None:
    """Without experts: a token at the edge between two experts may go to the other one, which is no rounding error."""
    layers, tokens = ("mamba1+mlp", "attention+mlp", "mamba2", "mlp"), ids(2, 40)
    exact = small(*layers)(tokens).logits
    rough = small(*layers).to(torch.bfloat16)(tokens).logits.float()
    assert (rough - exact).norm() / exact.norm() < 0.015


def test_residual_stream_is_float32_when_asked() -> None:
    seen = []
    for flag in (True, False):
        model = small("mamba1", residual_float32=flag).to(torch.bfloat16)
        model.layers[0].register_forward_hook(lambda module, args, output: seen.append(output[0].dtype))
        model(ids(1, 3))
    assert seen == [torch.float32, torch.bfloat16]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(torch.tensor([[3.0, 4.0]])), "input_ids must be int64 or int32, got torch.float32; use input_ids"),
        (lambda m: m(torch.tensor([[3, 61]])), "token id 61 is out of range; the vocabulary is 0 to 60"),
        (
            lambda m: m(torch.tensor([[3]], device="meta")),
            r"input_ids is on meta and the model on cpu; use input_ids.to\(model.device\)",
        ),
        (
            lambda m: m(torch.tensor([[3]]), labels=torch.tensor([[3]], device="meta")),
            "labels is on meta and the model on cpu",
        ),
        (lambda m: m(torch.tensor([[-1, 3]])), "token id -1"),
        (lambda m: m(torch.tensor([3])), "input_ids must be"),
        (lambda m: m(torch.zeros(1, 0, dtype=torch.int64)), "at least one token"),
        (lambda m: m(ids(2, 3), attention_mask=torch.ones(2, 4)), r"attention_mask is \[2, 4\]"),
        (lambda m: m(ids(2, 3), segments=torch.ones(1, 3)), r"segments is \[1, 3\]"),
        (lambda m: m(ids(2, 3), state=m.new_state(3)), "state has 3 rows and input_ids 2"),
        (lambda m: m(ids(1, 3), state=small("mamba1").new_state(1)), "state has 1 layers and the model 4"),
        (
            lambda m: m(ids(1, 3), state=small("mamba2", "attention", "mamba2", "mlp").new_state(1)),
            "state of layer 0 is SSMState .* another model",
        ),
        (lambda m: build("mamba-130"), "did you mean 'mamba-130m'"),
        (lambda m: build(3), "a preset's name or a ModelConfig"),
    ],
)
def test_mistakes_are_one_line(call: object, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        call(small(*HYBRID))
    assert "\n" not in str(caught.value)


def test_forward_compiles_without_a_break() -> None:
    model, tokens = small("mamba1+mlp", "attention+mlp", "mamba2+moe"), ids(2, 12)
    expected = model(tokens, labels=tokens).loss
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = compiled(tokens, labels=tokens).loss
    torch.testing.assert_close(loss, expected)
    expected_gradient = torch.autograd.grad(expected, model.layers[0].mixer.A_log)[0]
    torch.testing.assert_close(torch.autograd.grad(loss, model.layers[0].mixer.A_log)[0], expected_gradient)


def test_states_made_together_are_those_that_the_mixers_make() -> None:
    """As on a GPU, where one tensor holds a form's states of all layers."""
    model = small("mamba1", "mamba2+mlp", "attention", "mlp", "mamba1+moe", "mamba2")
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        model.to(dtype)
        together = model._mamba_states(3)
        assert sorted(together) == [0, 1, 4, 5]
        for index, state in together.items():
            alone = model.layers[index].mixer.new_state(3, model.device, dtype)
            assert type(state) is type(alone)
            for name, tensor in alone.tensors().items():
                torch.testing.assert_close(state.tensors()[name], tensor, rtol=0, atol=0)
                assert state.tensors()[name].is_contiguous()
            state.ssm.add_(1.0)  # no two layers share memory
        assert all(float(state.ssm.min()) == float(state.ssm.max()) == 1.0 for state in together.values())
        assert [layer is None for layer in model.new_state(3).layers] == [False, False, False, True, False, False]


def test_a_model_without_mixers_has_an_empty_state() -> None:
    model, tokens = small("mlp", "moe"), ids(2, 5)
    output = model(tokens, state=model.new_state(2))
    torch.testing.assert_close(output.logits, model(tokens).logits)
    assert output.state.layers == (None, None)
