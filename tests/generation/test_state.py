"""States as values: what they have absorbed, going on, forking, saving, and states that do not fit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from statespan.errors import UserError
from statespan.generation import GenerationState, generate, load_state, save_state
from statespan.models.language_model import LanguageModel

PROMPT = [3, 17, 42, 8, 8, 60, 1, 29, 33]


def greedy(model: LanguageModel, prompt: Any, count: int, **options: Any) -> Any:
    return generate(model, prompt, max_new_tokens=count, temperature=0, **options)


def copied(state: GenerationState) -> list[torch.Tensor]:
    """What the state holds, without the room for more in a cache's buffers."""
    values = []
    for layer in state.model_state.layers:
        for name, value in layer.tensors().items() if layer else ():
            used = slice(layer.length) if name in ("key", "value", "position") else slice(None)
            values.append(value[:, used].clone() if value.dim() > 1 else value.clone())
    return values


def test_going_on_equals_not_having_stopped(model: LanguageModel) -> None:
    whole = greedy(model, PROMPT, 15).token_ids
    first = greedy(model, PROMPT, 6, return_state=True)
    second = greedy(model, [], 5, state=first.state, return_state=True)
    third = greedy(model, [], 4, state=second.state)
    assert first.token_ids + second.token_ids + third.token_ids == whole
    assert first.state.pending == first.token_ids[-1]
    assert greedy(model, PROMPT, 6).state is None


def test_a_state_has_absorbed_all_but_the_newest_token(model: LanguageModel) -> None:
    result = greedy(model, PROMPT, 6, return_state=True)
    absorbed = torch.tensor([[*result.prompt_token_ids, *result.token_ids][:-1]])
    follow = torch.tensor([[5, 9]])
    with torch.no_grad():
        fresh = model(absorbed, state=model.new_state(1)).state
        expected = model(follow, state=fresh).logits
        ours = model(follow, state=result.state.model_state).logits
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_a_new_turn_equals_the_whole_conversation(model: LanguageModel) -> None:
    """Rows of a batch that stop at different times give states that go on as if they had been alone."""
    prompts, turn = [PROMPT, PROMPT[:2], [60] * 4], [7, 7, 21]
    alone = [greedy(model, prompt, 9).token_ids for prompt in prompts]
    results = greedy(model, prompts, 9, return_state=True, stop_token_ids=[alone[1][2]])
    for prompt, result in zip(prompts, results, strict=True):
        expected = greedy(model, [*prompt, *result.token_ids, *turn], 7).token_ids
        assert greedy(model, turn, 7, state=result.state).token_ids == expected


def test_a_state_is_a_value(model: LanguageModel) -> None:
    """Used again and again, by one prompt or several, it gives the same and does not change."""
    state = greedy(model, PROMPT, 4, return_state=True).state
    before = copied(state)
    turns = [[4], [50, 2, 2], []]
    alone = [greedy(model, turn, 8, state=state).token_ids for turn in turns]
    together = greedy(model, turns, 8, state=state)
    assert [result.token_ids for result in together] == alone
    assert [greedy(model, turn, 8, state=state).token_ids for turn in turns] == alone
    assert all(torch.equal(old, new) for old, new in zip(before, copied(state), strict=True))


def test_forks_of_a_prefill_sample_like_the_whole_prompt(model: LanguageModel) -> None:
    state = generate(model, PROMPT, max_new_tokens=0, return_state=True).state
    assert state.pending == PROMPT[-1]
    forks = generate(model, [[]] * 4, state=state, seed=3, max_new_tokens=10)
    whole = generate(model, [PROMPT] * 4, seed=3, max_new_tokens=10)
    assert [fork.token_ids for fork in forks] == [result.token_ids for result in whole]
    assert len({fork.token_ids for fork in forks}) > 1


def test_a_state_of_a_forward_goes_on(model: LanguageModel) -> None:
    with torch.no_grad():
        state = model(torch.tensor([PROMPT[:4], PROMPT[1:5]]), state=model.new_state(2)).state
    results = greedy(model, [PROMPT[4:], PROMPT[5:]], 6, state=state)
    for start, result in enumerate(results):
        assert result.token_ids == greedy(model, PROMPT[start:], 6).token_ids


def test_a_state_can_be_used_with_gradients_on(tiny: Callable[[str], LanguageModel]) -> None:
    """It is no inference tensor: training may start from it."""
    for kind in ("attention", "lstm"):
        model = tiny(kind)
        state = greedy(model, PROMPT, 4, return_state=True).state
        model(torch.tensor([[1, 2, 3]]), state=state.model_state).logits.sum().backward()
        assert model.embedding.weight.grad is not None
        with torch.no_grad():
            model(torch.tensor([[1, 2, 3]]), state=state.model_state)


def test_saved_and_restored(model: LanguageModel, tmp_path: Path) -> None:
    first = greedy(model, [PROMPT, PROMPT[:3]], 5, return_state=True)[1]
    save_state(tmp_path / "a.state", first.state, model)
    restored = load_state(tmp_path / "a.state", model)
    assert restored.pending == first.state.pending
    expected = greedy(model, [4, 4], 10, state=first.state)
    assert greedy(model, [4, 4], 10, state=restored).token_ids == expected.token_ids
    save_state(tmp_path / "b.state", restored, model)
    assert (tmp_path / "a.state").read_bytes() == (tmp_path / "b.state").read_bytes()
    assert not list(tmp_path.glob("*.part"))


def test_a_saved_state_holds_no_room_to_grow(tiny: Callable[[str], LanguageModel], tmp_path: Path) -> None:
    model = tiny("attention")
    save_state(tmp_path / "x", greedy(model, PROMPT, 4, return_state=True).state, model)
    with safe_open(tmp_path / "x", framework="pt") as file:
        assert list(file.get_tensor("layers.0.key").shape) == [1, 12, 4, 6]


def test_a_state_of_another_model_is_refused(tiny: Callable[[str], LanguageModel], tmp_path: Path) -> None:
    state = greedy(tiny("mamba1"), PROMPT, 2, return_state=True).state
    for other in ("jamba", "mamba2", "attention"):
        with pytest.raises(UserError, match="another model"):
            generate(tiny(other), [1], state=state)
    save_state(tmp_path / "s", state, tiny("mamba1"))
    with pytest.raises(UserError, match="another config"):
        load_state(tmp_path / "s", tiny("mamba2"))
    with pytest.raises(UserError, match="is float32, the model works in bfloat16"):
        load_state(tmp_path / "s", tiny("mamba1").to(torch.bfloat16))


def test_a_state_with_the_wrong_number_of_rows(tiny: Callable[[str], LanguageModel]) -> None:
    model = tiny("mamba1")
    with pytest.raises(UserError, match="the state has 2 rows and there are 3 prompts"):
        generate(model, [[1], [2], [3]], state=model.new_state(2))
    with pytest.raises(UserError, match="prompt 0 is empty; the state of a forward needs a token"):
        generate(model, [], state=model.new_state(1))


def test_files_that_are_no_states(tiny: Callable[[str], LanguageModel], tmp_path: Path) -> None:
    model = tiny("mamba1")
    with pytest.raises(UserError, match="no such state file"):
        load_state(tmp_path / "missing", model)
    save_file({"x": torch.zeros(2)}, tmp_path / "weights")
    with pytest.raises(UserError, match="no saved state"):
        load_state(tmp_path / "weights", model)
    (tmp_path / "text").write_text("hello")
    with pytest.raises(UserError, match="not a state file, or damaged"):
        load_state(tmp_path / "text", model)
    save_state(tmp_path / "good", greedy(model, PROMPT, 2, return_state=True).state, model)
    data = (tmp_path / "good").read_bytes()
    for size in (0, 5, 100, len(data) // 2, len(data) - 1):
        (tmp_path / "cut").write_bytes(data[:size])
        with pytest.raises(UserError, match="not a state file, or damaged"):
            load_state(tmp_path / "cut", model)
    with safe_open(tmp_path / "good", framework="pt") as file:
        header = json.loads(file.metadata()["statespan"])
    save_file({"layers.0.conv": torch.zeros(1)}, tmp_path / "part", metadata={"statespan": json.dumps(header)})
    with pytest.raises(UserError, match=r"the state lacks layers\.0\.ssm"):
        load_state(tmp_path / "part", model)


def test_a_failed_save_keeps_the_old_file(
    tiny: Callable[[str], LanguageModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("gru")
    state = greedy(model, PROMPT, 2, return_state=True).state
    save_state(tmp_path / "s", state, model)
    old = (tmp_path / "s").read_bytes()

    def full_disk(tensors: Any, path: Path, **_: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("statespan.generation.state.save_file", full_disk)
    with pytest.raises(UserError, match=r"cannot write the state to .*No space left"):
        save_state(tmp_path / "s", state, model)
    assert (tmp_path / "s").read_bytes() == old
    assert [file.name for file in tmp_path.iterdir()] == ["s"]
    with pytest.raises(UserError, match="cannot write the state"):
        save_state(tmp_path / "no" / "such" / "folder", state, model)
