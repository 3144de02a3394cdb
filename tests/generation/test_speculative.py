"""Speculation must be seen in the clock only: tokens, log-probabilities and states are those of plain decoding."""

import random
from dataclasses import dataclass, field

import pytest
import torch

from statespan.errors import UserError
from statespan.generation import DraftModel, PromptLookup, Speculation, generate, generate_stream
from statespan.generation.acceptance import judge
from statespan.generation.drafters import Draft
from statespan.generation.sampling import NonFiniteLogits, RandomNumbers, Sampling, weights

PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7, 9]]
SAMPLED = {"temperature": 0.9, "top_p": 0.95, "seed": 11}
GREEDY = {"temperature": 0}


@dataclass(frozen=True)
class Oracle:
    """Drafts the known texts, with mistakes: its drafts are whole, cut short in different places, wrong or absent."""

    texts: list[list[int]]
    mistakes: float = 0.3
    calls: list[int] = field(default_factory=list)

    def begin(self, target, sampling, seeds):
        return _OracleAtWork(self, list(range(len(seeds))), random.Random(0))


class _OracleAtWork:
    def __init__(self, oracle, rows, chance):
        self.oracle, self.rows, self.chance = oracle, rows, chance

    def propose(self, texts, counts):
        drafts = []
        for row, text, count in zip(self.rows, texts, counts, strict=True):
            known = self.oracle.texts[row]
            assert list(text) == known[: len(text)]
            size = self.chance.randint(0, count)
            ids = known[len(text) : len(text) + size]
            drafts.append(Draft(tuple((t + 1) % 61 if self.chance.random() < self.oracle.mistakes else t for t in ids)))
        self.oracle.calls.append(sum(len(draft.ids) for draft in drafts))
        return drafts

    def keep(self, rows):
        self.rows = [self.rows[row] for row in rows]


def speculation(plain, mistakes=0.3, num_drafts=5, adaptive=False) -> Speculation:
    texts = [[*one.prompt_token_ids, *one.token_ids] for one in plain]
    return Speculation(Oracle(texts, mistakes), num_drafts, adaptive)


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_tokens_are_those_of_plain_decoding(model, options):
    """Every kind of model, rows of unequal length, drafts right and wrong: the rollback is exact."""
    options = {"max_new_tokens": 40, "ignore_eos": True, **options}
    plain = generate(model, PROMPTS, **options)
    together = generate(model, PROMPTS, speculation=speculation(plain), **options)
    assert [one.token_ids for one in together] == [one.token_ids for one in plain]
    report = together[0].speculation
    assert 0 < report.accepted < report.drafted and report.verify_steps < 38
    for prompt, one in zip(PROMPTS[:2], plain, strict=False):
        seed = {} if "seed" not in options else {"seed": one.seed}
        alone = generate(model, prompt, speculation=speculation([one]), **(options | seed))
        assert alone.token_ids == one.token_ids


def test_all_drafts_accepted_or_none(tiny):
    model = tiny("jamba")
    plain = generate(model, PROMPTS, max_new_tokens=31, ignore_eos=True, **GREEDY)
    right = generate(
        model, PROMPTS, max_new_tokens=31, ignore_eos=True, speculation=speculation(plain, 0.0, 1), **GREEDY
    )
    wrong = generate(model, PROMPTS, max_new_tokens=31, ignore_eos=True, speculation=speculation(plain, 1.0), **GREEDY)
    for found in (right, wrong):
        assert [one.token_ids for one in found] == [one.token_ids for one in plain]
    assert right[0].speculation.acceptance == 1.0 and wrong[0].speculation.accepted == 0
    assert wrong[0].speculation.tokens == 30 * 3


def test_states_are_those_of_plain_decoding(model):
    """Also where the last token came in the middle of accepted drafts."""
    options = {"max_new_tokens": 23, "return_state": True, **GREEDY}
    first = generate(model, PROMPTS, **(options | {"ignore_eos": True}))
    stops = (first[0].token_ids[7], first[1].token_ids[12])
    options |= {"stop_token_ids": stops}
    plain = generate(model, PROMPTS, **options)
    assert len({len(one.token_ids) for one in plain}) > 1
    fast = generate(model, PROMPTS, speculation=speculation(first, 0.15), **options)
    for ours, theirs in zip(fast, plain, strict=True):
        assert ours.token_ids == theirs.token_ids and ours.finish_reason == theirs.finish_reason
        assert ours.state.pending == theirs.state.pending
        ids = torch.tensor([[ours.state.pending, 7, 7]])
        with torch.inference_mode():
            found, want = (model(ids, state=one.state.model_state).logits for one in (ours, theirs))
        torch.testing.assert_close(found, want, atol=3e-5, rtol=1e-4)
    again = generate(model, [5, 6], state=fast[2].state, max_new_tokens=9, ignore_eos=True, **GREEDY)
    want = generate(model, [5, 6], state=plain[2].state, max_new_tokens=9, ignore_eos=True, **GREEDY)
    assert again.token_ids == want.token_ids


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
def test_with_the_state_after_each_token_kept(tiny, kind, kept_states):
    """As on a GPU: no accepted token is fed again, and a state may end in the middle of the drafts."""
    model = tiny(kind)
    for options in (GREEDY, SAMPLED):
        test_tokens_are_those_of_plain_decoding(model, options)
    test_states_are_those_of_plain_decoding(model)


def test_a_state_that_is_gone_on_from_stays_valid(tiny):
    """Two continuations of one state; the second one speculates, and must not write into what the first one holds."""
    model = tiny("attention")
    start = generate(model, PROMPTS[0], max_new_tokens=3, return_state=True, **GREEDY).state
    held = generate(model, [7], state=start, max_new_tokens=20, return_state=True, ignore_eos=True, **GREEDY)
    want = generate(model, [7], state=held.state, max_new_tokens=5, ignore_eos=True, **GREEDY).token_ids
    plain = generate(model, [8], state=start, max_new_tokens=20, ignore_eos=True, **GREEDY)
    text = Oracle([[start.pending, *plain.prompt_token_ids, *plain.token_ids]], 0.4)
    fast = generate(
        model, [8], state=start, max_new_tokens=20, ignore_eos=True, speculation=Speculation(text, 4, False), **GREEDY
    )
    assert fast.token_ids == plain.token_ids
    assert generate(model, [7], state=held.state, max_new_tokens=5, ignore_eos=True, **GREEDY).token_ids == want


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_penalty_logprobs_and_events(tiny, options):
    model = tiny("mamba2 hybrid")
    options = {
        "max_new_tokens": 25,
        "repetition_penalty": 1.6,
        "presence_penalty": 0.5,
        "logprobs": 3,
        "ignore_eos": True,
        **options,
    }
    plain = generate(model, PROMPTS, **options)
    fast = generate(model, PROMPTS, speculation=speculation(plain), **options)
    for ours, theirs in zip(fast, plain, strict=True):
        assert ours.token_ids == theirs.token_ids and len(ours.logprobs) == 25
        for a, b in zip(ours.logprobs, theirs.logprobs, strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
            assert dict(a.top) == pytest.approx(dict(b.top), abs=1e-4)
    events = list(generate_stream(model, PROMPTS[0], speculation=speculation(plain[:1]), **options))
    assert [event.token_id for event in events] == list(plain[0].token_ids)
    assert [event.finish_reason for event in events] == [None] * 24 + ["length"]


def test_a_draft_model(tiny):
    """Greedy drafts of another model, and of the model itself, which are all accepted."""
    model, other = tiny("jamba"), tiny("mamba2")
    options = {"max_new_tokens": 30, "ignore_eos": True, **GREEDY}
    for prompts in (PROMPTS, PROMPTS[:1]):
        plain = generate(model, prompts, **options)
        for drafter, least in ((DraftModel(other), 0.0), (DraftModel(model), 1.0)):
            fast = generate(model, prompts, speculation=Speculation(drafter, 4, False), **options)
            assert [one.token_ids for one in fast] == [one.token_ids for one in plain]
            assert fast[0].speculation.acceptance >= least and fast[0].speculation.drafted > 0


def test_prompt_lookup_finds_what_followed():
    index = PromptLookup(shortest=2, longest=5).begin(None, Sampling(), [0])
    text = [1, 2, 3, 4, 9, 1, 2, 3, 5, 9, 2, 3]
    assert index.propose([text], [4])[0].ids == (5, 9, 2, 3)  # of equal matches the newest
    index = PromptLookup(shortest=2, longest=5).begin(None, Sampling(), [0, 0])
    longer = [4, 1, 2, 3, 7, 8, 1, 2, 3, 5, 4, 1, 2, 3]
    assert [draft.ids for draft in index.propose([longer, [1, 2]], [3, 3])] == [(7, 8, 1), ()]  # the longest match
    index.keep([1])
    assert index.propose([[1, 2, 6, 1, 2]], [9])[0].ids == (6, 1, 2)
    with pytest.raises(UserError, match="shortest"):
        PromptLookup(shortest=0)


def test_lookup_against_the_plain_search():
    chance = random.Random(1)
    index = PromptLookup(shortest=2, longest=6, candidates=10**6).begin(None, Sampling(), [0])
    text = [chance.randrange(3) for _ in range(5)]
    for _ in range(200):
        text += [chance.randrange(3) for _ in range(chance.randrange(1, 4))]
        found = index.propose([text], [4])[0].ids
        matches = []
        for end in range(2, len(text)):
            size = next((n for n in range(min(6, end)) if text[end - 1 - n] != text[-1 - n]), min(6, end))
            if size >= 2:
                matches.append((size, end))
        want = () if not matches else tuple(text[max(matches)[1] :][:4])
        assert found == want


def test_sampled_tokens_have_exactly_the_models_distribution():
    """Rejection sampling over two drafted tokens: chi-square of all outcomes against the product of the model's p."""
    generator = torch.Generator().manual_seed(3)
    tables = torch.randn(5, 4, generator=generator) * 1.5  # p after each token, and at the beginning (row 4)
    proposals = torch.randn(5, 4, generator=generator).softmax(-1)
    sampling = Sampling(temperature=0.8, top_k=3)
    p = weights(tables, sampling)
    p = (p / p.sum(-1, keepdim=True)).double()
    numbers = RandomNumbers(torch.Generator().manual_seed(4))
    draws, counts, accepted = 4_000, torch.zeros(4, 4, 4), 0
    drafting = torch.Generator().manual_seed(5)
    for _ in range(draws):
        first = int(torch.multinomial(proposals[4], 1, generator=drafting))
        second = int(torch.multinomial(proposals[first], 1, generator=drafting))
        draft = Draft((first, second), proposals[[4, first]])
        (verdict,) = judge(tables[[4, first, second]], [draft], sampling, [numbers])
        accepted += verdict.num_accepted
        text = list(verdict.ids)
        while len(text) < 3:  # go on without drafts
            text += judge(tables[[text[-1]]], [Draft()], sampling, [numbers])[0].ids
        counts[tuple(text)] += 1
    expected = draws * p[4][:, None, None] * p[:4][:, :, None] * p[:4][None, :, :]
    possible = expected > 0
    assert counts[~possible].sum() == 0
    chi_square = ((counts - expected).square() / expected)[possible].sum()
    degrees = int(possible.sum()) - 1
    assert chi_square < degrees + 4 * (2 * degrees) ** 0.5
    # The acceptance of the first draft is sum(min(p, q)), the most that any rule can reach.
    best = torch.minimum(p[4], proposals[4].double()).sum()
    assert accepted / draws > best and accepted / draws < 2 * best


def test_sampled_text_of_a_draft_model_is_distributed_as_the_models(tiny):
    """End to end: pairs of tokens after a prompt, drawn with and without a draft model that is often wrong."""
    model, other = tiny("mamba1"), tiny("mamba2")
    options = {"max_new_tokens": 3, "ignore_eos": True, "temperature": 0.7, "top_k": 4, "seed": 0}
    rows = 600
    counts: list[dict[tuple[int, ...], int]] = []
    for chosen in (None, Speculation(DraftModel(other), 2, False)):
        found: dict[tuple[int, ...], int] = {}
        for one in generate(model, [PROMPTS[0]] * rows, speculation=chosen, **options):
            found[one.token_ids[1:]] = found.get(one.token_ids[1:], 0) + 1
        counts.append(found)
    seen = sorted(set(counts[0]) | set(counts[1]))
    a, b = (torch.tensor([float(found.get(pair, 0)) for pair in seen]) for found in counts)
    often = a + b >= 10
    chi_square = ((a - b).square() / (a + b))[often].sum()
    degrees = int(often.sum())
    assert degrees >= 5 and chi_square < degrees + 4 * (2 * degrees) ** 0.5


def test_numbers_come_in_the_order_of_plain_decoding():
    numbers = RandomNumbers(torch.Generator().manual_seed(8))
    want = torch.rand(130, dtype=torch.float64, generator=torch.Generator().manual_seed(8)).tolist()
    assert numbers.peek(70) == want[:70]
    assert [numbers.use(3), numbers.use(1), numbers.peek(2)] == [want[:3], want[3:4], want[4:6]]
    assert numbers.use(100) == want[4:104]


def test_logits_that_are_nan_name_the_row():
    logits = torch.zeros(4, 5)
    logits[3] = torch.nan
    numbers = [RandomNumbers(torch.Generator()) for _ in range(2)]
    with pytest.raises(NonFiniteLogits) as caught:
        judge(logits, [Draft((0,)), Draft((0,))], Sampling(temperature=0), numbers)
    assert caught.value.row == 1
    # A place that is not reached does not matter.
    judge(logits, [Draft((0,)), Draft((3,))], Sampling(temperature=0), numbers)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["mamba1", "mamba2", "jamba", "s4"])
def test_graphs_on_a_gpu(tiny, kind):
    """The verifier's CUDA graphs, where there are any: drafts whole, cut short, wrong and absent; 1 and 3 rows."""
    model = tiny(kind).cuda()
    for options in ({"max_new_tokens": 60, "ignore_eos": True, **extra} for extra in (GREEDY, SAMPLED)):
        for prompts in (PROMPTS, PROMPTS[:1]):
            plain = generate(model, prompts, **options)
            for mistakes in (0.0, 0.15, 0.5):
                fast = generate(model, prompts, speculation=speculation(plain, mistakes), **options)
                assert [one.token_ids for one in fast] == [one.token_ids for one in plain]
    drafted = generate(model, PROMPTS, speculation=Speculation(DraftModel(model), 3, False), **options)
    assert drafted[0].speculation.acceptance > 0.9


def test_bad_options(tiny):
    with pytest.raises(UserError, match="num_drafts"):
        Speculation(PromptLookup(), 0)
    model = tiny("mamba1")
    small = type(model)(model.config.replace(vocab_size=50))
    with pytest.raises(UserError, match="share a vocabulary"):
        generate(model, [1], speculation=Speculation(DraftModel(small)), max_new_tokens=2)
