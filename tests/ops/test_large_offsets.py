"""More than 2^31 numbers: the last of a million tokens as if they came alone. The scans have tests of their own."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from statespan import ops

TOKENS, WIDTH, LAST, BEFORE = 1 << 20, 2056, 1000, 8  # a conv looks back 3 tokens
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_a_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
Op = Callable[[Tensor, slice], Tensor]  # of x [t WIDTH], tokens `slice` of all


def some(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)


def convolution() -> Op:
    weight, bias = some(WIDTH, 4), some(WIDTH)
    return lambda x, _: ops.causal_conv1d(x[None], weight, bias, backend="triton")[0]


def segmented_convolution() -> Op:
    weight, segments = some(WIDTH, 4), torch.arange(TOKENS, device=DEVICE) // 700
    return lambda x, tokens: ops.causal_conv1d(x[None], weight, segments=segments[tokens][None], backend="triton")[0]


def norm() -> Op:
    weight = some(WIDTH)
    return lambda x, _: ops.rms_norm(x, weight, eps=1e-5, residual=x, backend="triton")[0]


def gated_norm() -> Op:
    weight = some(WIDTH)
    return lambda x, _: ops.gated_rms_norm(x, x, weight, eps=1e-5, group_size=WIDTH // 2, backend="triton")


def loss() -> Op:
    weight, labels = some(17, WIDTH) / 50, torch.arange(TOKENS, device=DEVICE) % 17
    return lambda x, tokens: ops.linear_cross_entropy(x, weight, labels[tokens], reduction="none", backend="triton")


def experts() -> Op:
    up, down = some(4, 64, WIDTH) / 50, some(4, WIDTH, 32) / 6
    index, weight = torch.arange(TOKENS, device=DEVICE)[:, None] % 4, torch.rand(TOKENS, 1, device=DEVICE)
    return lambda x, tokens: ops.grouped_mlp(x, index[tokens], weight[tokens], up, down, backend="triton")


MAKERS = (convolution, segmented_convolution, norm, gated_norm, loss, experts)


def close(found: Tensor, expected: Tensor) -> None:
    assert (found.double() - expected.double()).abs().max() <= 2**-7 * expected.double().abs().max()


@needs_a_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("make", MAKERS)
def test_a_million_tokens(make: Callable[[], Op]) -> None:
    op, x, end = make(), some(TOKENS, WIDTH).requires_grad_(), TOKENS - LAST
    y = op(x, slice(0, TOKENS))
    upstream = torch.randn_like(y[-LAST:])
    (gradient,) = torch.autograd.grad(y[-LAST:], x, upstream)
    assert (gradient[: end - BEFORE] == 0).all()  # all of it is written, and nothing of the last in a wrong place
    ending = x.detach()[end - BEFORE :].requires_grad_()
    alone = op(ending, slice(end - BEFORE, TOKENS))[-LAST:]
    close(y[-LAST:], alone)
    close(gradient[-LAST:], torch.autograd.grad(alone, ending, upstream)[0][-LAST:])
    close(y[:LAST], op(x.detach()[:LAST], slice(0, LAST)))


@needs_a_gpu
@pytest.mark.gpu
def test_attention_over_a_million_slots() -> None:
    """Of 17 kv heads, whole and in pages; the first and the last head against float64."""
    heads, head_dim, page = 17, 128, 16
    query, key, value = some(1, heads, head_dim), some(1, TOKENS, heads, head_dim), some(1, TOKENS, heads, head_dim)
    assert key.numel() > 1 << 31
    key[:, -5:] *= 4  # so that the last slots matter
    exact = [
        torch.softmax(query[0, h].double() @ key[0, :, h].double().t() / head_dim**0.5, 0) @ value[0, :, h].double()
        for h in (0, heads - 1)
    ]
    position = torch.arange(TOKENS, device=DEVICE, dtype=torch.int32)[None]
    whole = ops.decode_attention(query, key, value, position, backend="triton")
    pages = [x.view(TOKENS // page, page, heads, head_dim) for x in (key, value)]
    table = torch.arange(TOKENS // page, device=DEVICE, dtype=torch.int32)[None]
    length = torch.tensor([TOKENS], device=DEVICE, dtype=torch.int32)
    for found in (whole, ops.paged_decode_attention(query, *pages, table, length, backend="triton")):
        for h, expected in zip((0, heads - 1), exact, strict=True):
            close(found[0, h], expected)


@needs_a_gpu
@pytest.mark.gpu
def test_states_of_more_than_2_to_the_31_numbers() -> None:
    """One-token updates of a large batch: the last rows as if alone."""
    batch, channels, states, last = 70_000, 2048, 16, 9
    state = torch.randn(1, channels, states, device=DEVICE).repeat(batch, 1, 1)
    assert state.numel() > 1 << 31
    u, dt, B = some(batch, channels), some(batch, channels), some(batch, 1, states)
    A = -torch.rand(channels, states, device=DEVICE)

    def update(rows: slice) -> tuple[Tensor, Tensor]:
        return ops.selective_state_update(state[rows], u[rows], dt[rows], A, B[rows], B[rows], backend="triton")

    y, after = update(slice(None))
    expected, expected_after = update(slice(batch - last, None))
    close(y[-last:], expected)
    close(after[-last:], expected_after)
    close(after[:last], update(slice(last))[1])


def apart(x: Tensor) -> Tensor:
    """[b t g n] with its groups 2^30 numbers from each other."""
    far, (_, tokens, groups, size) = (1 << 30) + 4096, x.shape
    memory = torch.empty((groups - 1) * far + tokens * size, device=x.device, dtype=x.dtype)
    return memory.as_strided(x.shape, (tokens * size, size, far, 1)).copy_(x)


@needs_a_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("name", ["x", "B", "C"])
def test_groups_more_than_2_to_the_31_numbers_apart(name: str) -> None:
    """As in a transpose of [b h t p] with a million tokens."""
    inputs = {"x": some(1, 70, 3, 16), "B": some(1, 70, 3, 16), "C": some(1, 70, 3, 16)}
    dt, decay = some(1, 70, 3), -torch.rand(48, 16, device=DEVICE)

    def run(x: Tensor, B: Tensor, C: Tensor) -> list[Tensor]:
        leaves = [value.detach().requires_grad_() for value in (x, B, C)]
        y = ops.ssd(x=leaves[0], dt=dt, A=decay[:3, 0], B=leaves[1], C=leaves[2], backend="triton")
        u, steps = leaves[0].flatten(2), dt.repeat_interleave(16, dim=2)
        scanned = ops.selective_scan(u, steps, decay, leaves[1], leaves[2], backend="triton")
        return [y, scanned, *torch.autograd.grad([y.sum(), scanned.sum()], leaves)]

    expected, found = run(**inputs), run(**inputs | {name: apart(inputs[name])})
    assert all(map(torch.equal, found, expected))
