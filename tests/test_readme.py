"""What the README and the docs say is so: Python blocks run, commands parse, links and presets exist."""

import re
import shlex
from pathlib import Path

import pytest

import statespan
from statespan.cli import COMMANDS, find_command

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(text: str, language: str) -> list[str]:
    """The fenced code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[list[str]]:
    """The lines of shell blocks as words, without comments."""
    lines = [line for block in blocks(text, "sh") for line in block.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("code", blocks(README, "python"))
def test_python_blocks_run(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_parse(page: Path) -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    for program, *words in commands(page.read_text(encoding="utf-8")):
        match program:
            case "make":
                assert set(words) <= set(targets), words
            case "statespan":
                find_command(words[0]).parse(words[0], words[1:])
            case "python":
                assert (ROOT / words[0]).exists(), words
            case _:
                assert program in {"pip", "git", "cd"}, program


def test_readme_has_what_a_newcomer_needs() -> None:
    assert blocks(README, "python")
    assert {("make", "demo"), ("make", "test")} <= {tuple(words) for words in commands(README)}
    used = {words[1] for words in commands(README) if words[0] == "statespan"}
    assert used == set(COMMANDS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_every_preset_of_the_table_exists() -> None:
    named = re.findall(r"`([a-z0-9.-]+)`", "\n".join(line for line in README.splitlines() if line.startswith("|")))
    presets = [name for name in named if re.match(r"(mamba|jamba|moe|black|transformer|mixtral|llama|lstm|gru)", name)]
    assert len(presets) >= 10
    assert set(presets) <= set(statespan.presets())


def test_the_file_map_names_folders_that_exist() -> None:
    """The map is the block after its heading: one path a line, what is in it after two spaces."""
    block = README.partition("## Where things are")[2].partition("```")[2].partition("```")[0]
    paths = [line.split()[0] for line in block.splitlines() if line.strip()]
    assert len(paths) > 8
    for path in paths:
        assert (ROOT / path).exists(), path
    packages = {p.name for p in (ROOT / "src" / "statespan").iterdir() if (p / "__init__.py").exists()}
    assert packages <= {Path(path).name for path in paths}
