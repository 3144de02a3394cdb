"""Models of transformers read and written: equal logits both ways, equal greedy tokens, every weight used."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from statespan.checkpoints import detect, load, save
from statespan.models.language_model import LanguageModel

SMALL = {"vocab_size": 97, "hidden_size": 32}
ATTENTION = SMALL | {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 40,
}
MAMBA = SMALL | {"num_hidden_layers": 3, "state_size": 8}
JAMBA = ATTENTION | {
    "num_hidden_layers": 4,
    "attn_layer_period": 3,
    "attn_layer_offset": 1,
    "num_experts": 3,
    "mamba_d_state": 8,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_theta": 500.0,
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("Mamba", MAMBA),
    "mamba odd": (
        "Mamba",
        MAMBA
        | {"hidden_size": 19, "state_size": 5, "conv_kernel": 3, "expand": 3, "time_step_rank": 7}
        | {"use_bias": True, "use_conv_bias": False, "tie_word_embeddings": False, "layer_norm_epsilon": 1e-3},
    ),
    "mamba2": ("Mamba2", MAMBA | {"num_heads": 4, "head_dim": 16, "n_groups": 2}),
    "mamba2 odd": (
        "Mamba2",
        MAMBA
        | {"hidden_size": 15, "num_heads": 6, "head_dim": 5, "n_groups": 3, "state_size": 7, "conv_kernel": 2}
        | {"use_bias": True, "use_conv_bias": False, "tie_word_embeddings": True, "chunk_size": 8}
        | {"time_step_limit": (0.05, 0.5), "layer_norm_epsilon": 1e-3},
    ),
    "jamba": ("Jamba", JAMBA),
    "jamba dense": ("Jamba", JAMBA | {"num_experts": 1, "tie_word_embeddings": True}),
    "jamba odd": (
        "Jamba",
        JAMBA
        | {"hidden_size": 30, "num_attention_heads": 5, "num_key_value_heads": 1, "intermediate_size": 21}
        | {"mamba_conv_bias": False, "mamba_proj_bias": True, "mamba_dt_rank": 3, "mamba_d_conv": 3, "mamba_expand": 1}
        | {"num_experts": 5, "num_experts_per_tok": 3, "expert_layer_period": 3, "expert_layer_offset": 0}
        | {"attn_implementation": "eager", "rms_norm_eps": 1e-3, "eos_token_id": [2, 51]},
    ),
    "jamba without attention": ("Jamba", JAMBA | {"attn_layer_period": 8, "attn_layer_offset": 6}),
    "mixtral": ("Mixtral", ATTENTION | {"num_local_experts": 3}),
    "mixtral odd": (
        "Mixtral",
        ATTENTION
        | {"hidden_size": 36, "head_dim": 10, "sliding_window": 5, "num_local_experts": 5, "num_experts_per_tok": 3}
        | {"tie_word_embeddings": True, "rope_theta": 123.0, "attn_implementation": "eager"},
    ),
    "mixtral of one expert": ("Mixtral", ATTENTION | {"num_local_experts": 1, "num_experts_per_tok": 1}),
    "llama": ("Llama", ATTENTION),
    "llama odd": (
        "Llama",
        ATTENTION
        | {"num_key_value_heads": 4, "head_dim": 6, "attention_bias": True, "mlp_bias": True, "intermediate_size": 21}
        | {"tie_word_embeddings": True, "rope_parameters": LLAMA3, "attn_implementation": "eager"},
    ),
    "mistral": ("Mistral", ATTENTION | {"sliding_window": 6}),
    "mistral without a window": ("Mistral", ATTENTION | {"sliding_window": None, "num_key_value_heads": 1}),
}


def whole_forward(theirs: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return theirs(ids, use_cache=False).logits


@dataclass(frozen=True)
class Pair:
    """A model of transformers, the folder where it saved itself, and ours loaded from there."""

    theirs: Any
    folder: Path
    ours: LanguageModel

    def truth(self, ids: Tensor) -> Tensor:
        """Their logits, from one forward without a cache."""
        return whole_forward(self.theirs, ids)


@pytest.fixture(scope="module", params=SHAPES)
def pair(request: Any, transformers: Any, randomise: Any, tmp_path_factory: Any) -> Pair:
    name, arguments = SHAPES[request.param]
    config = getattr(transformers, name + "Config")(**arguments)
    # Their grouped matrix products refuse rows that are no multiple of 16 bytes, so experts run one by one.
    theirs = randomise(transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager"))
    folder = tmp_path_factory.mktemp("theirs")
    theirs.save_pretrained(folder)
    return Pair(theirs, folder, load(folder))


def loaded_by_transformers(transformers: Any, folder: Path, attention: str) -> Any:
    """AutoModelForCausalLM's reading of a folder; no name is missing, left over or of another shape."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, attn_implementation=attention, experts_implementation="eager"
    )
    assert not any(report.values()), report
    return model.eval()


def greedy(model: LanguageModel, ids: Tensor, count: int) -> Tensor:
    """`count` most likely tokens after `ids`, one step at a time over the state."""
    state, chosen = model.new_state(len(ids)), [ids]
    for _ in range(count):
        with torch.no_grad():
            output = model(chosen[-1], state=state, logits_at="last")
        state = output.state
        chosen.append(output.logits[:, -1].argmax(-1, keepdim=True))
    return torch.cat(chosen[1:], dim=1)


def test_logits_equal_theirs(pair: Pair, token_ids: Tensor, assert_close: Any) -> None:
    with torch.no_grad():
        assert_close(pair.ours(token_ids).logits, pair.truth(token_ids))


def test_greedy_tokens_equal_theirs_recomputed_from_scratch(pair: Pair, token_ids: Tensor) -> None:
    ids = prompt = token_ids[:, :7]
    for _ in range(9):
        ids = torch.cat([ids, pair.truth(ids)[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(greedy(pair.ours, prompt, 9), ids[:, 7:])


def test_chunked_prefill_equals_their_single_shot(pair: Pair, token_ids: Tensor, assert_close: Any) -> None:
    """On purpose unlike transformers, whose Mamba and Jamba start every chunk from a zero state."""
    state, logits = pair.ours.new_state(2), []
    for chunk in token_ids.split([8, 1, 2, 10], dim=1):
        with torch.no_grad():
            output = pair.ours(chunk, state=state)
        state, logits = output.state, [*logits, output.logits]
    assert_close(torch.cat(logits, dim=1), pair.truth(token_ids))


def test_right_padding_changes_nothing(pair: Pair, token_ids: Tensor, assert_close: Any) -> None:
    """On purpose unlike transformers, whose state absorbs the padding: a padded prefill, then one step."""
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, 13:] = 0
    with torch.no_grad():
        prefill = pair.ours(token_ids[:, :20], attention_mask=mask, state=pair.ours.new_state(2))
        step = pair.ours(token_ids[:, 20:], state=prefill.state)
    alone = torch.cat([token_ids[:1, :13], token_ids[:1, 20:]], dim=1)
    assert_close(prefill.logits[:1, :13], pair.truth(alone)[:, :13])
    assert_close(step.logits[:1], pair.truth(alone)[:, 13:])
    assert_close(step.logits[1:], pair.truth(token_ids[1:])[:, 20:])


def test_packed_sequences_do_not_leak(pair: Pair, token_ids: Tensor, assert_close: Any) -> None:
    """On purpose unlike transformers, which takes seq_idx and drops it."""
    segments = (torch.arange(21) >= 9).long().expand(2, -1)
    with torch.no_grad():
        logits = pair.ours(token_ids, segments=segments).logits
    assert_close(logits[:, :9], pair.truth(token_ids[:, :9]))
    assert_close(logits[:, 9:], pair.truth(token_ids[:, 9:]))


def test_transformers_reads_what_we_write(pair: Pair, transformers: Any, tmp_path: Path, token_ids: Tensor) -> None:
    save(pair.ours, tmp_path, "transformers", max_shard_bytes=20_000)
    assert (tmp_path / "model.safetensors.index.json").exists()
    back = loaded_by_transformers(transformers, tmp_path, pair.theirs.config._attn_implementation)
    windowless = pair.theirs.config.model_type == "mistral" and pair.theirs.config.sliding_window is None
    assert back.config.model_type == ("llama" if windowless else pair.theirs.config.model_type)
    assert torch.equal(whole_forward(back, token_ids), pair.truth(token_ids))
    assert_same_weights(back, pair.theirs)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "vocab_size", "initializer_range"):
        assert getattr(back.config, name) == getattr(pair.theirs.config, name), name


def test_native_round_trip_is_bitwise(pair: Pair, tmp_path: Path, token_ids: Tensor) -> None:
    save(pair.ours, tmp_path, max_shard_bytes=20_000)
    assert detect(tmp_path) == "statespan"
    back = load(tmp_path)
    assert back.config == pair.ours.config
    for (name, expected), (back_name, actual) in zip(
        pair.ours.state_dict().items(), back.state_dict().items(), strict=True
    ):
        assert name == back_name and torch.equal(actual, expected) and actual.dtype == expected.dtype
    with torch.no_grad():
        assert torch.equal(back(token_ids).logits, pair.ours(token_ids).logits)


def test_names_in_memory_are_read_too(pair: Pair, tmp_path: Path) -> None:
    """transformers 5 stacks experts in memory; a state dict that was saved as it stands has those names."""
    names = {name: tensor.clone() for name, tensor in pair.theirs.state_dict().items()}
    shutil.copy(pair.folder / "config.json", tmp_path)
    save_file(names, tmp_path / "model.safetensors")
    assert_same_weights(load(tmp_path), pair.ours)


def assert_same_weights(model: nn.Module, other: nn.Module) -> None:
    expected, actual = other.state_dict(), model.state_dict()
    assert expected.keys() == actual.keys()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


RENAMED = {
    "jamba": {".feed_forward.": ".moe.", ".pre_ff_layernorm.": ".pre_moe_layernorm."},
    "mamba": {"backbone.embeddings.": "backbone.embedding."},
    "mamba2": {"backbone.": "model.backbone.", "lm_head.": "model.lm_head."},
}


def test_older_names(pair: Pair, tmp_path: Path) -> None:
    """The first release of Jamba, original embeddings, and buffers that old Llama files hold."""
    model_type = pair.theirs.config.model_type
    stored = load_file(pair.folder / "model.safetensors")
    for new, old in RENAMED.get(model_type, {}).items():
        stored = {name.replace(new, old): tensor for name, tensor in stored.items()}
    if model_type == "llama":
        stored["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    shutil.copy(pair.folder / "config.json", tmp_path)
    save_file(stored, tmp_path / "model.safetensors")
    assert_same_weights(load(tmp_path), pair.ours)
