"""`statespan lab` on the command line."""

from pathlib import Path

import pytest

from statespan.cli import main
from statespan.lab.registry import EXPERIMENTS


def test_without_a_name_they_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lab"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in EXPERIMENTS)


def test_an_experiment_runs_and_writes_its_page_and_the_index(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["lab", "hippo", "--setting", "tiny", "length=60", "--only", "legs", "--seeds", "2", "--out", str(tmp_path)]
    assert main(words) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "hippo.md")
    page = (tmp_path / "hippo.md").read_text()
    assert "length=60" in page and "seeds: 0 1\n" in page and "command: `statespan lab hippo --setting tiny" in page
    assert "(hippo.md)" in (tmp_path / "index.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "hippo.md",
        "hippo.tiny.jsonl",
        "hippo.tiny.png",
        "index.md",
    ]


def test_a_dry_run_prints_the_setting_alone(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["lab", "all", "--setting", "h100", "--dry-run", "--out", str(tmp_path / "x")]) == 0
    printed = capsys.readouterr().out
    assert all(f"# {name}\n" in printed for name in EXPERIMENTS) and "steps=204800" in printed
    assert not (tmp_path / "x").exists()


def test_mistakes_get_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = ["--out", str(tmp_path)]
    for words, message in (
        (["lab", "hipo"], "unknown experiment: 'hipo'; did you mean 'hippo'?"),
        (["lab", "hippo", "--setting", "quick"], "unknown setting of hippo: 'quick'; known: cpu, h100, tiny"),
        (["lab", "hippo", "length=10"], "length 10 is too short for 12 waves; give 240 or more"),
        (["lab", "hippo", "--seeds", "0"], "argument --seeds: must be at least 1, got 0"),
        (["lab", "hippo", "--report"], "no results of hippo in"),
        (["lab", "costs", "device=tpu9"], "'tpu9' is no device"),
    ):
        assert main([*words, *out]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
