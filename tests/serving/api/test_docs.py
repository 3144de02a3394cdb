"""What docs/server.md shows works: its Python as it stands, its curl commands too, at another port."""

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from openai.types import EmbeddingCreateParams
from openai.types import completion_create_params as completion_params
from openai.types.chat import completion_create_params as chat_params

from statespan.cli import find_command
from statespan.models.language_model import LanguageModel
from statespan.serving.api.schemas import ChatBody, CompletionBody, EmbeddingsBody, StreamOptions

PAGE = (Path(__file__).parents[3] / "docs" / "server.md").read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:8000"


def block(language: str) -> str:
    found = re.search(rf"^```{language}\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
    assert found is not None
    return found.group(1)


def test_python(start: Callable[..., Any], model: LanguageModel, capsys: pytest.CaptureFixture[str]) -> None:
    running = start(model, name="demo")
    code = block("python")
    assert ADDRESS in code
    exec(compile(code.replace(ADDRESS, running.url), "server.md", "exec"), {})
    *_, size, call = capsys.readouterr().out.splitlines()
    assert size == "32" and re.fullmatch(r'weather \{"name":.*\}', call)


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl(start: Callable[..., Any], model: LanguageModel) -> None:
    running = start(model, name="demo")
    script = block("bash").replace(ADDRESS, running.url)
    output = subprocess.run(["sh", "-ec", script], capture_output=True, text=True, check=True, timeout=120).stdout
    assert '"object":"text_completion"' in output and output.rstrip().endswith("data: [DONE]")


def test_every_field_and_option_is_told() -> None:
    ignored = ["user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_retention"]
    ignored += ["reasoning_effort", "verbosity", "include_obfuscation"]
    told = re.search(r"Accepted and ignored:(.*?)\.\n", PAGE, flags=re.DOTALL)
    assert told is not None and re.findall(r"`(\w+)`", told.group(1)) == ignored
    known = {*CompletionBody.model_fields, *ChatBody.model_fields, *EmbeddingsBody.model_fields}
    assert set(ignored) <= known | set(StreamOptions.model_fields)
    named = re.search(r"Ours besides\*\*:(.*?)\n\n", PAGE, flags=re.DOTALL)
    assert named is not None
    assert set(re.findall(r"`(\w+)`", re.sub(r"\(.*?\)", "", named.group(1)))) <= known
    absent = re.search(r"Not here at all:(.*?)\.\n", PAGE, flags=re.DOTALL)
    assert absent is not None
    for theirs, ours in (
        (chat_params.CompletionCreateParamsBase, ChatBody),
        (completion_params.CompletionCreateParamsBase, CompletionBody),
        (EmbeddingCreateParams, EmbeddingsBody),
    ):
        assert {*theirs.__annotations__} - {*ours.model_fields} <= set(re.findall(r"`(\w+)`", absent.group(1)))
    options = set(re.findall(r"`(--[a-z-]+)", PAGE))
    words = find_command("serve").parse("serve", ["model"])
    assert {option[2:].replace("-", "_") for option in options} <= set(vars(words))
