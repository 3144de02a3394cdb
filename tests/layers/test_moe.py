"""The router's rules against a slow loop in float64, its losses and statistics, and Sinkhorn balancing."""

import math

import pytest
import torch
from torch import Tensor

from statespan.layers.config import MoEConfig
from statespan.layers.moe import MoE
from statespan.layers.routing import RouterMetrics, drop_overflow, sinkhorn

HIDDEN = 6
CONFIGS = {
    "switch": MoEConfig(num_experts=5, top_k=1, intermediate_size=4, activation="gelu", capacity_factor=1.0),
    "jamba": MoEConfig(num_experts=7, top_k=2, intermediate_size=4),
    "mixtral": MoEConfig(num_experts=4, top_k=2, intermediate_size=4, renormalize=True),
    "blackmamba": MoEConfig(
        num_experts=4, top_k=1, intermediate_size=4, bias=True, router_bias=True, score_function="sigmoid"
    ),
    "sigmoid-renormalized": MoEConfig(
        num_experts=6, top_k=3, intermediate_size=4, score_function="sigmoid", renormalize=True, capacity_factor=0.5
    ),
}


def expert_by_hand(layer: MoE, e: int, token: Tensor) -> Tensor:
    experts = layer.experts
    inner = experts.up_proj[e] @ token
    if experts.up_proj_bias is not None:
        inner = inner + experts.up_proj_bias[e]
    if experts.activation == "swiglu":
        gate, up = inner[: len(inner) // 2], inner[len(inner) // 2 :]
        inner = gate * torch.sigmoid(gate) * up
    else:
        inner = 0.5 * inner * (1 + torch.erf(inner / math.sqrt(2)))
    out = experts.down_proj[e] @ inner
    return out if experts.down_proj_bias is None else out + experts.down_proj_bias[e]


def moe_by_hand(layer: MoE, tokens: Tensor, real: list[bool]) -> tuple[Tensor, dict[str, Tensor]]:
    """Token by token, choice by choice, from the equations; also the losses and statistics."""
    config = layer.config
    capacity = math.inf
    if config.capacity_factor is not None and layer.training:
        capacity = math.ceil(config.capacity_factor * sum(real) * config.top_k / config.num_experts)
    taken = [0] * config.num_experts
    counts = torch.zeros(config.num_experts, dtype=torch.float64)
    outputs, probabilities, z, dropped = [], [], [], 0
    for token, is_real in zip(tokens, real, strict=True):
        output = torch.zeros_like(token)
        if is_real:
            logits = layer.router.weight @ token
            if layer.router.bias is not None:
                logits = logits + layer.router.bias
            exponentials = torch.exp(logits)
            p = exponentials / exponentials.sum() if config.score_function == "softmax" else 1 / (1 + 1 / exponentials)
            order = sorted(range(config.num_experts), key=lambda e: -p[e].item())[: config.top_k]
            scale = sum(p[e] for e in order) if config.renormalize else 1.0
            for e in order:
                counts[e] += 1
                taken[e] += 1
                if taken[e] > capacity:
                    dropped += 1
                else:
                    output = output + p[e] / scale * expert_by_hand(layer, e, token)
            probabilities.append(p / p.sum())
            z.append(torch.log(exponentials.sum()) ** 2)
        outputs.append(output)
    f = counts / sum(real)
    statistics = {
        "load_balance_loss": config.num_experts * (f * torch.stack(probabilities).mean(0)).sum(),
        "router_z_loss": torch.stack(z).mean(),
        "expert_share": counts / counts.sum(),
        "dropped_fraction": torch.tensor(dropped / counts.sum().item(), dtype=torch.float64),
    }
    return torch.stack(outputs), statistics


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_against_the_loop(name: str, padded: bool, training: bool) -> None:
    torch.manual_seed(1)
    layer = MoE(HIDDEN, CONFIGS[name]).double().train(training)
    with torch.no_grad():
        layer.router.weight.mul_(4)  # spread the scores, so that capacity is exceeded
    hidden = torch.randn(2, 13, HIDDEN, dtype=torch.float64, requires_grad=True)
    segments = torch.zeros(2, 13, dtype=torch.int64)
    if padded:
        segments[0, :4] = -1
        segments[1, 5] = -1
        segments[1, 9:] = -2
    output, router = layer(hidden, segments if padded else None)
    truth, statistics = moe_by_hand(layer, hidden.flatten(0, 1), (segments >= 0).flatten().tolist())

    torch.testing.assert_close(output, truth.view_as(hidden), rtol=1e-10, atol=1e-12)
    for key, value in statistics.items():
        torch.testing.assert_close(getattr(router, key), value, rtol=1e-12, atol=1e-14)
    if training and layer.config.capacity_factor is not None:
        assert statistics["dropped_fraction"] > 0.05
    else:
        assert router.dropped_fraction == 0

    direction = torch.randn_like(truth).view_as(hidden)
    inputs = [hidden, *layer.parameters()]
    ours = (output * direction).sum() + router.load_balance_loss + router.router_z_loss
    expected = (truth.view_as(hidden) * direction).sum() + statistics["load_balance_loss"] + statistics["router_z_loss"]
    grads = torch.autograd.grad(ours, inputs)
    for mine, theirs in zip(grads, torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


def test_capacity_drops_in_token_order() -> None:
    chosen = torch.tensor([[0, 1], [0, 2], [-1, -1], [0, 1], [1, 0], [0, 1]])
    # 10 choices of 3 experts: ceil(10 / 3) = 4 each; expert 0 is asked 5 times, expert 1 4 times
    served = drop_overflow(chosen, 3, 1.0)
    assert served.tolist() == [[0, 1], [0, 2], [-1, -1], [0, 1], [1, 0], [-1, 1]]
    served = drop_overflow(chosen, 3, 0.5)  # ceil(5 / 3) = 2 each
    assert served.tolist() == [[0, 1], [0, 2], [-1, -1], [-1, 1], [-1, -1], [-1, -1]]


@pytest.mark.parametrize("capacity_factor", [0.25, 1.0, 1.25, 2.0])
def test_dropped_count(capacity_factor: float) -> None:
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(0, 8, (101, 2), generator=generator)
    capacity = math.ceil(capacity_factor * 202 / 8)
    expected = torch.bincount(chosen.flatten(), minlength=8).clamp(max=capacity)
    served = drop_overflow(chosen, 8, capacity_factor)
    assert torch.equal(torch.bincount(served[served >= 0], minlength=8), expected)
    assert torch.equal(served[served >= 0], chosen[served >= 0])


def test_evaluation_depends_on_the_token_alone() -> None:
    torch.manual_seed(0)
    config = MoEConfig(num_experts=4, top_k=1, intermediate_size=8, capacity_factor=0.5, balancing="sinkhorn")
    layer = MoE(HIDDEN, config).double().eval()
    hidden = torch.randn(3, 9, HIDDEN, dtype=torch.float64)
    whole = layer(hidden)[0]
    alone = torch.stack([torch.cat([layer(row[i : i + 1][None])[0][0] for i in range(9)]) for row in hidden])
    torch.testing.assert_close(whole, alone, rtol=1e-12, atol=1e-13)


def test_padding_does_not_touch_the_real_tokens() -> None:
    torch.manual_seed(0)
    config = MoEConfig(num_experts=4, top_k=2, intermediate_size=8, capacity_factor=1.0, balancing="sinkhorn")
    layer = MoE(HIDDEN, config).double()
    hidden = torch.randn(1, 11, HIDDEN, dtype=torch.float64)
    segments = torch.tensor([[-1, 0, 0, -1, 0, 1, 1, 1, -1, 1, -1]])
    padded, router = layer(hidden.masked_fill(segments[..., None] < 0, 1e4), segments)
    plain, alone = layer(hidden[segments >= 0][None])
    torch.testing.assert_close(padded[segments >= 0], plain[0], rtol=1e-12, atol=1e-13)
    assert padded[segments < 0].abs().max() == 0
    for name in ("load_balance_loss", "router_z_loss", "expert_share", "dropped_fraction"):
        torch.testing.assert_close(getattr(router, name), getattr(alone, name), rtol=1e-6, atol=1e-6)


def test_all_padding() -> None:
    layer = MoE(HIDDEN, MoEConfig(num_experts=4, intermediate_size=8, capacity_factor=1.0, balancing="sinkhorn"))
    output, router = layer(torch.randn(1, 3, HIDDEN), torch.full((1, 3), -1))
    assert output.abs().max() == 0
    assert router.load_balance_loss == 0 and router.router_z_loss == 0 and router.dropped_fraction == 0
    (router.load_balance_loss + router.router_z_loss + output.sum()).backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in layer.parameters())


@pytest.mark.parametrize("top_k", [1, 2])
def test_load_balance_is_top_k_at_uniform_routing(top_k: int) -> None:
    """Every expert chosen equally often with equal scores: 1 for Switch, top_k in general."""
    logits = torch.zeros(12, 4)
    chosen = torch.stack([(torch.arange(12) + k) % 4 for k in range(top_k)], dim=1)
    router = RouterMetrics(logits, logits.softmax(-1), chosen, chosen)
    assert router.load_balance_loss.item() == pytest.approx(top_k, abs=1e-6)
    assert router.router_z_loss.item() == pytest.approx(math.log(4) ** 2, rel=1e-6)
    assert torch.equal(router.expert_share, torch.full((4,), 0.25))


def test_collapsed_routing_costs_num_experts() -> None:
    logits = torch.tensor([[50.0, 0, 0, 0, 0]]).repeat(9, 1)
    chosen = torch.zeros(9, 1, dtype=torch.int64)
    assert RouterMetrics(logits, logits.softmax(-1), chosen, chosen).load_balance_loss.item() == pytest.approx(5.0)


def test_load_balance_is_the_peers() -> None:
    """Equal to transformers' pooled loss of a Jamba layer, padding included."""
    from transformers.models.jamba.modeling_jamba import load_balancing_loss_func

    torch.manual_seed(0)
    layer = MoE(HIDDEN, CONFIGS["jamba"])
    segments = torch.tensor([[0] * 6 + [-1] * 3, [0] * 9])
    _, router = layer(torch.randn(2, 9, HIDDEN), segments)
    theirs = load_balancing_loss_func((router.logits,), 7, 2, (segments >= 0).long())
    torch.testing.assert_close(router.load_balance_loss, theirs, rtol=1e-5, atol=1e-6)


def test_gradient_reaches_the_router_through_the_score_alone() -> None:
    """d output / d router weight = d p_i / d router weight * E_i(x): the choice itself carries no gradient."""
    torch.manual_seed(0)
    layer = MoE(HIDDEN, MoEConfig(num_experts=3, top_k=1, intermediate_size=4)).double()
    token = torch.randn(1, 1, HIDDEN, dtype=torch.float64)
    output, router = layer(token)
    i = int(router.chosen[0, 0])
    p = router.scores[0]
    (grad,) = torch.autograd.grad(output.sum(), layer.router.weight)
    jacobian = p[i] * (torch.eye(3, dtype=torch.float64)[i] - p)  # of softmax
    expected = jacobian[:, None] * token[0] * expert_by_hand(layer, i, token[0, 0]).sum()
    torch.testing.assert_close(grad, expected.detach(), rtol=1e-10, atol=1e-12)


def test_router_is_float32_under_autocast_and_in_bfloat16() -> None:
    torch.manual_seed(0)
    layer = MoE(64, MoEConfig(num_experts=4, intermediate_size=8))
    hidden = torch.randn(1, 5, 64)
    with torch.autocast("cpu", torch.bfloat16):
        _, router = layer(hidden)
    expected = hidden[0] @ layer.router.weight.T
    torch.testing.assert_close(router.logits, expected, rtol=1e-5, atol=1e-6)
    _, router = layer.bfloat16()(hidden.bfloat16())
    expected = hidden[0].bfloat16().float() @ layer.router.weight.float().T
    assert router.logits.dtype == router.scores.dtype == torch.float32
    torch.testing.assert_close(router.logits, expected, rtol=1e-5, atol=1e-6)


def marginal_error(logits: Tensor, iterations: int) -> float:
    """Largest relative error of the rows' and columns' sums of the balanced matrix."""
    balanced = sinkhorn(logits, None, iterations).exp()
    rows, columns = balanced.sum(1) * logits.shape[0] - 1, balanced.sum(0) * logits.shape[1] - 1
    return max(rows.abs().max().item(), columns.abs().max().item())


def iterations_from_ones(logits: Tensor, tolerance: float) -> int:
    """Rounds that the textbook start d1 = 1 needs for the same marginals."""
    matrix, d1 = logits.exp(), torch.ones(logits.shape[1], dtype=logits.dtype)
    for count in range(1, 100):
        d0 = 1 / (len(matrix) * (matrix * d1).sum(1))
        d1 = 1 / (matrix.shape[1] * (matrix * d0[:, None]).sum(0))
        balanced = d0[:, None] * matrix * d1
        if (balanced.sum(1) * len(matrix) - 1).abs().max() < tolerance:
            return count
    raise AssertionError("no convergence")


def test_sinkhorn_start_saves_iterations() -> None:
    """Two rounds from BlackMamba's start where experts differ by a constant; the textbook start needs more."""
    torch.manual_seed(0)
    logits = 0.6 * torch.randn(2048, 8, dtype=torch.float64) + 2 * torch.randn(8, dtype=torch.float64)
    assert marginal_error(logits, 2) < 1e-3
    assert iterations_from_ones(logits, 1e-3) >= 4


def test_sinkhorn_is_the_plain_matrix_iteration() -> None:
    torch.manual_seed(0)
    logits = torch.randn(7, 3, dtype=torch.float64)
    matrix = logits.exp()
    d1 = 1 / (3 * matrix.sum(0))
    for _ in range(3):
        d0 = 1 / (7 * (matrix * d1).sum(1))
        d1 = 1 / (3 * (matrix * d0[:, None]).sum(0))
    torch.testing.assert_close(sinkhorn(logits, None, 3).exp(), d0[:, None] * matrix * d1, rtol=1e-12, atol=1e-15)


def test_sinkhorn_does_not_overflow() -> None:
    logits = torch.tensor([[300.0, 0.0], [290.0, 0.0], [-300.0, 10.0], [5.0, 5.0]])
    assert torch.isfinite(sinkhorn(logits, None, 8)).all()


def test_sinkhorn_spreads_a_collapsed_router() -> None:
    """In training every expert gets its share though plain argmax would send all to one; the score stays sigmoid."""
    torch.manual_seed(0)
    config = MoEConfig(
        num_experts=4, top_k=1, intermediate_size=4, router_bias=True, score_function="sigmoid", balancing="sinkhorn"
    )
    layer = MoE(HIDDEN, config)
    with torch.no_grad():
        layer.router.bias.copy_(torch.tensor([5.0, 0.0, 0.0, 0.0]))
    hidden = torch.randn(1, 400, HIDDEN)
    _, training = layer(hidden)
    _, evaluation = layer.eval()(hidden)
    assert evaluation.expert_share[0] == 1
    assert training.expert_share.min() > 0.15
    with torch.no_grad():
        logits = hidden[0] @ layer.router.weight.T + layer.router.bias
        balanced = sinkhorn(2.0 * logits, None, 100)  # the released code balances exp(2 logits)
    assert (training.chosen[:, 0] == balanced.argmax(1)).float().mean() > 0.99
    output = layer.train()(hidden)[0]
    e = int(training.chosen[3, 0])
    score = torch.sigmoid(layer.router.weight[e] @ hidden[0, 3] + layer.router.bias[e])
    torch.testing.assert_close(output[0, 3], score * expert_by_hand(layer, e, hidden[0, 3]), rtol=1e-4, atol=1e-6)


def test_experts_start_as_linear_layers_do() -> None:
    torch.manual_seed(0)
    experts = MoE(64, MoEConfig(num_experts=4, intermediate_size=25, activation="relu", bias=True)).experts
    for parameter, bound in ((experts.up_proj, 1 / 8), (experts.down_proj, 1 / 5), (experts.down_proj_bias, 1 / 5)):
        assert bound * 0.98 < parameter.abs().max() <= bound
        assert parameter.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)


def test_compiles_as_one_graph() -> None:
    torch.manual_seed(0)
    layer = MoE(HIDDEN, CONFIGS["switch"])
    hidden, segments = torch.randn(2, 5, HIDDEN), torch.tensor([[0, 0, 0, 0, 0], [0, 0, 1, 1, -1]])

    def loss(hidden: Tensor) -> Tensor:
        output, router = layer(hidden, segments)
        return output.square().sum() + router.load_balance_loss + router.router_z_loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(hidden), loss(hidden), rtol=1e-5, atol=1e-6)
