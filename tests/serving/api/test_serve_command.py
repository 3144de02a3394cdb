"""`statespan serve`: keys, options and warnings; what is wrong is told before anything takes time."""

import argparse
from pathlib import Path
from typing import Any

import pytest

import statespan
from statespan.cli import main
from statespan.cli.serve import COMMAND, engine_options, num_bytes, read_keys, server_options, warnings
from statespan.serving.drafters import ModelDrafter
from statespan.serving.speculative import SpeculativeDecode


def parsed(*words: str) -> argparse.Namespace:
    return COMMAND.parse("serve", ["some/model", *words])


def test_defaults_are_local_and_limited() -> None:
    options = server_options(parsed())
    assert options.name == "model" and options.api_keys == ()
    assert set(options.allowed_hosts) == {"127.0.0.1", "localhost", "[::1]"}
    assert parsed().host == "127.0.0.1"
    assert warnings(parsed(), options, has_template=True) == []


def test_options_reach_their_places(tmp_path: Path) -> None:
    arguments = parsed(
        *("--max-rows", "3", "--page-bytes", "2M", "--cache-bytes", "1G", "--spill-dir", str(tmp_path)),
        *("--max-waiting", "5", "--prefill-tokens", "7", "--spill-bytes", "9"),
        *("--max-body-bytes", "11K", "--max-prompt-tokens", "12", "--max-new-tokens", "13", "--max-sequences", "14"),
        *("--drain", "1.5", "--name", "n", "--allowed-host", "a.example", "--log-text"),
    )
    engine, server = engine_options(arguments), server_options(arguments)
    assert (engine.max_rows, engine.page_budget_bytes, engine.cache_bytes) == (3, 2 << 20, 1 << 30)
    assert (engine.max_waiting, engine.prefill_tokens, engine.spill_bytes, engine.spill_dir) == (5, 7, 9, tmp_path)
    assert (server.max_body_bytes, server.max_prompt_tokens, server.max_new_tokens) == (11 << 10, 12, 13)
    assert (server.max_sequences, server.drain_s, server.name, server.log_text) == (14, 1.5, "n", True)
    assert "a.example" in server.allowed_hosts


def test_drafts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert engine_options(parsed()).num_drafts == 0
    assert engine_options(parsed("--num-drafts", "3")).num_drafts == 3
    assert engine_options(parsed("--draft", "small")).num_drafts == 6
    assert engine_options(parsed("--draft", "small", "--num-drafts", "2")).num_drafts == 2
    model = statespan.build("jamba-tiny", seed=0)
    model.save(tmp_path / "model")
    services: list[Any] = []
    monkeypatch.setattr("statespan.serving.api.server.serve", lambda service, sock, **_: services.append(service))
    words = ["--max-rows", "2", "--page-bytes", "1M", "--cache-bytes", "0", "--port", "0"]
    assert main(["serve", str(tmp_path / "model"), "--draft", str(tmp_path / "model"), *words]) == 0
    decode = services[0].backend.engine.engine.decode
    assert isinstance(decode, SpeculativeDecode) and isinstance(decode.drafter, ModelDrafter)


def test_bound_elsewhere_it_warns() -> None:
    arguments = parsed("--host", "0.0.0.0")
    options = server_options(arguments)
    told = " ".join(warnings(arguments, options, has_template=False))
    assert options.allowed_hosts == ()
    assert "--api-key-file" in told and "--tls-cert" in told and "--chat-template" in told


def test_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("STATESPAN_API_KEYS", " a, ,b ")
    assert read_keys(None) == ("a", "b")
    file = tmp_path / "keys"
    file.write_text("# ours\nfirst\n\n second \n")
    file.chmod(0o600)
    assert read_keys(file) == ("first", "second")
    assert capsys.readouterr().err == ""
    file.chmod(0o644)
    read_keys(file)
    assert "chmod 600" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "value"), [("0", 0), ("1000", 1000), ("512M", 512 << 20), ("4g", 4 << 30)])
def test_bytes(text: str, value: int) -> None:
    assert num_bytes(text) == value


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--api-key-file", "missing"], "keys cannot be read"),
        (["--tls-cert", "a.pem"], "needs both"),
        (["--tls-cert", "a.pem", "--tls-key", "b.pem"], "a.pem: no such file"),
        (["--page-bytes", "x"], "no number of bytes"),
        (["--drain", "-1"], "drain_s must be 0 or above"),
        (["--drain", "nan"], "drain_s must be 0 or above"),
        (["--host", "no.such.host.invalid"], "no address"),
        (["--chat-template", "missing.jinja"], "missing.jinja cannot be read"),
        (["--device", "abacus"], "is no device"),
        (["--api-keys", "secret"], "unknown option"),
        (["--num-drafts", "0"], "--num-drafts"),
        ([], "some/model"),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "some/model", "--port", "0", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_missing_library_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import importlib.util

    real = importlib.util.find_spec

    def without(*names: str) -> Any:
        monkeypatch.setattr("statespan.cli.serve.find_spec", lambda name: None if name in names else real(name))

    without("fastapi", "ray")
    assert main(["serve", "some/model"]) == 2
    assert "fastapi: pip install 'statespan[serve]'" in capsys.readouterr().err
    without("ray")
    assert main(["serve", "some/model", "--replicas", "2"]) == 2
    assert "ray: pip install 'statespan[ray]'" in capsys.readouterr().err
