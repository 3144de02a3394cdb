"""Config files: JSON that is read strictly, each key once, with one line for whatever is wrong."""

import difflib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from statespan.errors import CheckpointError

# Keys that transformers writes or has written and that change nothing of what a decoder computes.
_INERT = """add_cross_attention architectures attention_dropout auto_map bad_words_ids begin_suppress_tokens
    chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype
    early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id id2label is_decoder is_encoder_decoder keys_to_ignore_at_inference label2id length_penalty
    max_length max_position_embeddings min_length model_type no_repeat_ngram_size num_beam_groups num_beams num_labels
    num_return_sequences output_attentions output_hidden_states output_scores prefix pretraining_tp problem_type
    remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id suppress_tokens
    task_specific_params temperature tf_legacy_loss tokenizer_class top_k top_p torch_dtype torchscript
    transformers_version typical_p unsloth_fixed unsloth_version use_bfloat16 use_cache"""
INERT_KEYS = frozenset(_INERT.split())


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; infinities are read bare and as {"__float__": "Infinity"} (transformers 5)."""
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing; give the folder of a complete checkpoint") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None
    if not text.strip():
        raise CheckpointError(f"{file} is empty; download or copy it again")
    try:
        value = json.loads(text, object_hook=_float_object)
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{file} is not JSON: {error.msg} at line {error.lineno}; mend it there") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} must hold a JSON object, it holds {type(value).__name__}")
    return value


def _float_object(value: dict[str, Any]) -> Any:
    if list(value) == ["__float__"]:
        return float(value["__float__"])
    return value


class Fields:
    """The keys of a config, taken one by one with their types; `finish` refuses whatever nobody took.

    Every problem is a CheckpointError that names the file and the key.
    """

    def __init__(self, values: Mapping[str, Any], where: str | Path, inert: Iterable[str] = ()) -> None:
        self.values = values
        self.where = where
        self._known = set(inert) | INERT_KEYS

    def take(self, name: str, default: Any = None) -> Any:
        """The value as it stands, or `default` where the key is absent."""
        self._known.add(name)
        return self.values.get(name, default)

    def integer(self, name: str, default: int | None = None, *, least: int = 1) -> int:
        """A whole number of at least `least`; without a default the key must be there."""
        value = self._present(name, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.error(name, value, f"a whole number of at least {least}")
        return value

    def optional_integer(self, name: str, *, least: int = 1) -> int | None:
        """A whole number, or None where the key is absent or null."""
        return None if self.take(name) is None else self.integer(name, least=least)

    def number(self, name: str, default: float | None = None) -> float:
        """A number; a null means the default, and without one the key must be there."""
        value = self._present(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
            raise self.error(name, value, "a number")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """True or false; a null means the default."""
        value = self._present(name, default)
        if not isinstance(value, bool):
            raise self.error(name, value, "true or false")
        return value

    def expect(self, name: str, *supported: Any) -> None:
        """Refuse every value of a feature but the supported ones; absent and null are supported."""
        value = self.take(name)
        if value is not None and value not in supported:
            wanted = " or ".join(json.dumps(option) for option in supported) or "null"
            raise CheckpointError(
                f"{self.where}: {name} = {json.dumps(value)} is not supported, only {wanted} is; "
                "choose another checkpoint"
            )

    def token_id(self, name: str, default: int | None = None) -> int | None:
        """One token id, or None; -1 means none, as in older files."""
        value = self.take(name, default)
        if value is None or value == -1:
            return None
        return self.integer(name, default, least=0)

    def token_ids(self, name: str, default: int | None = None) -> tuple[int, ...]:
        """Token ids, written as one number, a list, or null."""
        value = self.take(name, default)
        items: list[Any] = [] if value is None else value if isinstance(value, list) else [value]
        for item in items:
            if isinstance(item, bool) or not isinstance(item, int):
                raise self.error(name, value, "a token id or a list of token ids")
        return tuple(item for item in items if item >= 0)

    def inner(self, name: str) -> "Fields":
        """The fields of a nested object; absent and null mean an empty one."""
        value = self.take(name)
        if value is not None and not isinstance(value, Mapping):
            raise self.error(name, value, "an object")
        fields = Fields(value or {}, f"{self.where}, {name}")
        fields._known -= INERT_KEYS
        return fields

    def error(self, name: str, value: Any, wanted: str) -> CheckpointError:
        """A value that is not what it must be."""
        return CheckpointError(f"{self.where}: {name} must be {wanted}, it is {value!r}; mend it there")

    def finish(self) -> None:
        """Refuse keys that nobody took: a feature must not be ignored in silence."""
        for name, value in self.values.items():
            if name in self._known or name.startswith("_") or value is None:
                continue
            near = difflib.get_close_matches(name, self._known - INERT_KEYS, n=1, cutoff=0.7)
            hint = f"did you mean {near[0]!r}?" if near else "remove it if it changes nothing"
            raise CheckpointError(f"{self.where}: key {name!r} is not known here; {hint}")

    def _present(self, name: str, default: Any) -> Any:
        value = self.take(name)
        if value is None:
            value = default
        if value is None:
            raise CheckpointError(f"{self.where}: {name} is missing; add it, or download the file again")
        return value
