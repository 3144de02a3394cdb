"""Kill a server's process while it spills its prefix cache, start another on the same folder, and compare its replies.

    python -m benchmarks.serving_restart [--kills 10]

Each round a process serves conversations with a cache so small that snapshots go to disk all the time; after a random
time it is killed (SIGKILL). Before the next one starts, a file is cut short. At the end a process reads what all left,
continues each conversation from it, and compares with `generate`: no wrong token, and the cut files dropped.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.record import Row, report
from benchmarks.serving_load import Conversation, alone, served_model
from statespan.models.language_model import LanguageModel
from statespan.serving.engine import Engine
from statespan.serving.options import EngineOptions

CONVERSATIONS = 6


def options(folder: Path) -> EngineOptions:
    """A few snapshots in memory, the others on disk."""
    return EngineOptions(max_rows=4, num_pages=600, cache_bytes=1 << 20, spill_dir=folder)


def serve(folder: Path, rounds: int | None) -> tuple[int, int, int]:
    """Hold conversations, for ever or so many turns each; returns (compared, restored, dropped)."""
    model = served_model(None)
    engine = Engine(model, options(folder))
    talks = [Conversation(random.Random(number), model.config.vocab_size, 10**9) for number in range(CONVERSATIONS)]
    compared, turn = 0, 0
    while rounds is None or turn < rounds:
        for number, talk in enumerate(talks):
            compared += _turn(model, engine, talk, f"{turn}.{number}", compare=rounds is not None)
        turn += 1
        if rounds is None:
            print(turn, flush=True)
    engine.check()
    metrics = engine.metrics()
    engine.close()
    return compared, metrics.spill_restored, metrics.spill_dropped


def _turn(model: LanguageModel, engine: Engine, talk: Conversation, name: str, compare: bool) -> int:
    """One turn of a conversation; the number of replies that were compared. The same in every process."""
    request = talk.next_request(name, new_tokens=8)
    engine.submit(request)
    replies: dict[int, list[int]] = {index: [] for index in range(request.num_samples)}
    while not engine.idle:
        for event in engine.step():
            replies[event.index] += event.token_ids
    talk.tokens += replies[0]
    if compare:
        for index, ids in replies.items():
            if tuple(ids) != alone(model, request, index):
                raise AssertionError(f"{name}: {ids} differs from what the request gives alone")
    return len(replies) if compare else 0


def killed(folder: Path, seconds: float) -> None:
    """A process that serves, and is killed so long after its first round."""
    command = [sys.executable, "-m", "benchmarks.serving_restart", "--serve", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(seconds)
        os.kill(process.pid, signal.SIGKILL)


def cut_one(folder: Path, rng: random.Random) -> int:
    """Cut a file of the cache short; 1 if there was one."""
    files = sorted(folder.rglob("*.safetensors"))
    if not files:
        return 0
    file = rng.choice(files)
    os.truncate(file, file.stat().st_size * 2 // 3)
    return 1


def main() -> None:
    """Kill, restart, compare and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve is not None:
        serve(arguments.serve, None)
        return
    rng, cut = random.Random(0), 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for _ in range(arguments.kills):
            killed(folder, rng.random())
            cut = cut_one(folder, rng)
        files = len(list(folder.rglob("*.safetensors")))
        compared, restored, dropped = serve(folder, rounds=3)
    if dropped < cut:
        raise AssertionError("a file that was cut short was not noticed")
    note = f"{files} files found, {restored} snapshots restored, {dropped} damaged files dropped"
    task = f"{arguments.kills} times kill -9 and restart"
    report("serving_restart", [Row(task, "replies as alone", compared, "", 0.0, note)], ["statespan", "torch"])


if __name__ == "__main__":
    main()
