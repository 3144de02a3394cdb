"""Tokenizers: bytes as they are, or any tokenizer.json."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from statespan.checkpoints.config_file import read_json
from statespan.errors import CheckpointError, UserError
from statespan.models.config import ModelConfig

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

BYTE_VOCABULARY = 256
NO_TEXT = 0xFF  # a byte that UTF-8 never has; stands for ids of a model with more of them than bytes
FILE, SETTINGS, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"


class ByteTokenizer:
    """A token is a byte of UTF-8 (MambaByte, arXiv 2401.13660); no special tokens, no files.

    Example:
        >>> ByteTokenizer().encode("né")
        [110, 195, 169]
        >>> ByteTokenizer().decode([110, 195, 169])
        'né'
    """

    vocab_size = BYTE_VOCABULARY
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    def encode(self, text: str) -> list[int]:
        """The bytes of `text`, also of an argument that was not UTF-8 (Python hands it over as surrogates)."""
        return list(text.encode("utf-8", errors="surrogateescape"))

    def decode(self, ids: list[int]) -> str:
        """The text of bytes; what is not UTF-8 becomes the replacement character, and so does each id from 256 on.

        Raises:
            UserError: an id is negative.
        """
        try:
            return bytes(min(i, NO_TEXT) for i in ids).decode("utf-8", errors="replace")
        except ValueError:
            raise UserError(f"token id {min(ids)} is negative; give the ids that a model can have, from 0 on") from None

    def save(self, directory: Path) -> None:
        """Nothing to write: a vocabulary of 256 without a tokenizer file is byte-level."""


class FileTokenizer:
    """A tokenizer.json of the tokenizers library, with the ids that begin and end a text.

    Args:
        backend: the tokenizer itself.
        bos_id: id that begins a text, or None.
        eos_ids: ids that end a text.
        settings: content of tokenizer_config.json, kept for saving.
        chat_template: content of chat_template.jinja, kept likewise.
    """

    def __init__(
        self,
        backend: "Backend",
        *,
        bos_id: int | None = None,
        eos_ids: tuple[int, ...] = (),
        settings: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
    ) -> None:
        self.backend = backend
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self.bos_id = bos_id
        self.eos_ids = eos_ids
        self.settings = dict(settings or {})
        self.chat_template = chat_template

    @classmethod
    def from_file(
        cls, file: str | Path, *, bos_id: int | None = None, eos_ids: tuple[int, ...] = ()
    ) -> "FileTokenizer":
        """Read tokenizer.json; ids that are not given come from the tokenizer_config.json beside it.

        Truncation and padding that the file asks for are left out: texts are encoded whole.

        Raises:
            CheckpointError: the file is missing or is no tokenizer.

        Example:
            >>> tokenizer = FileTokenizer.from_file("checkpoint/tokenizer.json")  # doctest: +SKIP
        """
        from tokenizers import Tokenizer as Backend  # half the time of all our imports, and byte models need none

        file = Path(file)
        read_json(file)
        try:
            backend = Backend.from_file(str(file))
        except Exception as error:  # the library raises plain Exception
            raise CheckpointError(f"{file} is no tokenizer that the tokenizers library reads: {error}") from None
        backend.no_truncation()  # the file may have some set, for whoever made it
        backend.no_padding()
        settings = read_json(file.parent / SETTINGS) if (file.parent / SETTINGS).exists() else {}
        template = file.parent / TEMPLATE
        chat_template = template.read_text(encoding="utf-8", errors="replace") if template.exists() else None
        tokenizer = cls(backend, bos_id=bos_id, eos_ids=eos_ids, settings=settings, chat_template=chat_template)
        if bos_id is None:
            tokenizer.bos_id = tokenizer._named_id("bos_token")
        if not eos_ids:
            named = tokenizer._named_id("eos_token")
            tokenizer.eos_ids = () if named is None else (named,)
        return tokenizer

    def _named_id(self, name: str) -> int | None:
        token = self.settings.get(name)
        text = token.get("content") if isinstance(token, Mapping) else token
        return self.backend.token_to_id(text) if isinstance(text, str) else None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; special tokens are those that the file itself adds, often a leading bos."""
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, without special tokens."""
        return self.backend.decode(ids, skip_special_tokens=True)

    def save(self, directory: Path) -> None:
        """Write tokenizer.json, and tokenizer_config.json and chat_template.jinja where there were such."""
        (directory / FILE).write_text(self.backend.to_str(pretty=True), encoding="utf-8")
        if self.settings:
            text = json.dumps(self.settings, indent=2, ensure_ascii=False) + "\n"
            (directory / SETTINGS).write_text(text, encoding="utf-8")
        if self.chat_template is not None:
            (directory / TEMPLATE).write_text(self.chat_template, encoding="utf-8")


def find_tokenizer(directory: Path, config: ModelConfig) -> ByteTokenizer | FileTokenizer | None:
    """The tokenizer of a checkpoint: its tokenizer.json, bytes for a vocabulary of 256, otherwise None."""
    if (directory / FILE).exists():
        return FileTokenizer.from_file(directory / FILE, bos_id=config.bos_token_id, eos_ids=config.eos_token_ids)
    return byte_tokenizer(config)


def byte_tokenizer(config: ModelConfig) -> ByteTokenizer | None:
    """Bytes for a vocabulary of 256, otherwise None: such a model needs no files to read text."""
    return ByteTokenizer() if config.vocab_size == BYTE_VOCABULARY else None
