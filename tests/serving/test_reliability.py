"""Short forms of the reliability benchmarks; docs/reliability.md has the long ones."""

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import serving_restart, serving_soak
from statespan.models.language_model import LanguageModel
from statespan.serving.rows import Rows

ROOT = Path(__file__).parents[2]


def test_a_short_soak(hybrid: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving_soak, "CHECK_EVERY", 20)
    monkeypatch.setattr(serving_soak, "COMPARE_ONE_IN", 5)
    options = replace(serving_soak.OPTIONS, num_pages=600, cache_bytes=1 << 18, spill_bytes=1 << 18, spill_dir=tmp_path)
    found = serving_soak.soak(hybrid, options, seconds=600, clients=12, requests=100)
    assert found.requests >= 100 and found.cancelled > 3 and found.checks > 1 and found.compared > 2
    assert found.metrics.cache_hits and found.metrics.spilled


def test_the_soak_notices_a_leak(hybrid: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    leave = Rows.leave

    def leaks(self: Rows, sample: object) -> None:
        self.pool.pages.allocate(1)
        leave(self, sample)

    monkeypatch.setattr(Rows, "leave", leaks)
    with pytest.raises(AssertionError):
        serving_soak.soak(hybrid, replace(serving_soak.OPTIONS, num_pages=600), seconds=60, clients=2, requests=3)


def test_killed_and_started_again(tmp_path: Path) -> None:
    """A process that spills is killed; the next one finds its files, but for one that was cut short."""
    command = [sys.executable, "-m", "benchmarks.serving_restart", "--serve", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None and process.stdout.readline() == "1\n"
        until = time.monotonic() + 600
        while _num_files(tmp_path) < 2 * serving_restart.CONVERSATIONS and time.monotonic() < until:
            time.sleep(0.01)  # files are written behind the replies; of a few none need be a beginning
        os.kill(process.pid, signal.SIGKILL)
    assert _num_files(tmp_path) >= 2 * serving_restart.CONVERSATIONS
    cut = serving_restart.cut_one(tmp_path, random.Random(0))
    compared, restored, dropped = serving_restart.serve(tmp_path, rounds=1)
    assert compared >= serving_restart.CONVERSATIONS and restored > 0 and dropped >= cut == 1


def _num_files(folder: Path) -> int:
    return len(list(folder.rglob("*.safetensors")))
