"""What the README and the docs say is so: Python blocks run, commands parse; links, files and presets exist."""

import argparse
import fnmatch
import re
import shlex
from pathlib import Path

import pytest

import statespan
from statespan.cli import COMMANDS, find_command

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
HISTORY = {"docs/log.md", "CHANGELOG.md"}  # what was there once
WRITTEN = {"tokenizer_config.json", "tuning.json", "inspection.json"}  # by users, or by commands
FILE = re.compile(r"[\w*][\w*/.-]*\.(?:py|cu|cuh|json|md|csv)")


def blocks(text: str, language: str) -> list[str]:
    """The fenced code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[list[str]]:
    """The lines of shell blocks as words, without comments."""
    lines = [line for block in blocks(text, "sh") for line in block.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def named(text: str) -> list[str]:
    """What stands between backticks outside of blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


def targets() -> set[str]:
    """What make can be told."""
    return set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))


@pytest.mark.parametrize("code", blocks(README, "python"))
def test_python_blocks_run(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_commands_parse(text: str) -> None:
    for program, *words in commands(text):
        match program:
            case "make":
                assert set(words) <= targets(), words
            case "statespan":
                find_command(words[0]).parse(words[0], words[1:])
            case "python":
                assert (ROOT / words[0]).exists(), words
            case _:
                assert program in {"pip", "git", "cd"}, program


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_commands_in_the_text_and_their_options_exist(text: str) -> None:
    """Their other words may be placeholders."""
    for program, *words in filter(None, map(str.split, named(text))):
        options = {word.strip("[]").partition("=")[0] for word in words if word.strip("[").startswith("--")}
        if program == "make":
            assert set(words) <= targets(), words
        elif program == "statespan" and words and words[0] in COMMANDS:
            parser = argparse.ArgumentParser()
            find_command(words[0]).add_arguments(parser)
            assert options <= set(parser.format_help().replace(",", " ").split()), words
        elif program == "pytest":
            assert all((ROOT / word).exists() for word in words if word.startswith("tests/")), words
        elif benchmark := re.fullmatch(r"benchmarks\.(\w+)", words[1] if words[:1] == ["-m"] else program):
            source = (ROOT / "benchmarks" / f"{benchmark[1]}.py").read_text(encoding="utf-8")
            assert options <= set(re.findall(r'"(--[\w-]+)"', source)), words


def test_files_in_the_text_exist() -> None:
    """Named from any folder on."""
    folders = ("src", "tests", "benchmarks", "docs")
    files = ["/" + path.relative_to(ROOT).as_posix() for folder in folders for path in (ROOT / folder).rglob("*.*")]
    for page in TEXTS.keys() - HISTORY:
        for name in filter(FILE.fullmatch, set(named(TEXTS[page])) - WRITTEN):
            assert fnmatch.filter(files, f"*/{name}"), f"{page} names {name}"


def test_readme_has_what_a_newcomer_needs() -> None:
    assert blocks(README, "python")
    assert {("make", "demo"), ("make", "test")} <= {tuple(words) for words in commands(README)}
    used = {words[1] for words in commands(README) if words[0] == "statespan"}
    assert used == set(COMMANDS)


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_to_files_and_headings(name: str) -> None:
    page = ROOT / name
    for target, heading in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", TEXTS[name]):
        if "://" not in target:
            linked = page.parent / target if target else page
            assert linked.exists(), target
            assert not heading or heading in anchors(linked.read_text(encoding="utf-8")), f"{target}#{heading}"


def anchors(text: str) -> set[str]:
    """What the headings of a page are called in links."""
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


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
