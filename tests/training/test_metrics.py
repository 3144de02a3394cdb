"""Metrics: sums, bits per byte, files, and what is dropped on resume; progress on a terminal and elsewhere."""

import json
import math
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

from statespan.layers.config import MoEConfig
from statespan.layers.moe import MoE
from statespan.training import ProgressDisplay, read_metrics
from statespan.training.metrics import MetricsWriter, Totals, bits_per_byte, router_row
from statespan.training.progress import duration


def test_bits_per_byte():
    assert bits_per_byte(math.log(256) * 10, 10) == pytest.approx(8.0)  # ten bytes guessed blindly
    assert bits_per_byte(math.log(2) * 12, 4) == pytest.approx(3.0)
    assert bits_per_byte(0.0, 0) == 0.0


def test_totals():
    totals = Totals(nats=20.0, num_predicted=10, num_bytes=40, num_tokens=64, seconds=2.0, aux_loss=3.0, num_steps=2)
    assert totals.row() == {
        "loss": 2.0,
        "bits_per_byte": pytest.approx(0.5 / math.log(2)),
        "aux_loss": 1.5,
        "tokens_per_s": 32.0,
    }
    assert Totals().row() == {"loss": 0.0, "bits_per_byte": 0.0, "aux_loss": 0.0, "tokens_per_s": 0.0}


def test_router_row_names_the_layers():
    torch.manual_seed(0)
    routers = [MoE(8, MoEConfig(num_experts=4, top_k=2, intermediate_size=8))(torch.randn(2, 6, 8))[1] for _ in "ab"]
    row = router_row(routers, [1, 4])
    assert row["layers.4.expert_share"] == routers[1].expert_share.tolist()
    assert sum(row["layers.1.expert_share"]) == pytest.approx(1.0)
    assert row["layers.1.load_balance_loss"] == routers[0].load_balance_loss.item()
    assert row["layers.4.router_z_loss"] == routers[1].router_z_loss.item()
    assert row["layers.4.dropped_fraction"] == 0.0
    json.dumps(row)


def scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory / "tensorboard"))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_rows_go_to_jsonl_and_tensorboard(tmp_path: Path):
    with MetricsWriter(tmp_path) as writer:
        writer.write({"step": 1, "loss": 2.5, "layers.0.expert_share": [0.25, 0.75]})
        writer.write({"step": 2, "loss": 1.5})
        assert len(read_metrics(tmp_path)) == 2  # each row is on the disk as soon as it is written
    assert read_metrics(tmp_path)[0] == {"step": 1, "loss": 2.5, "layers.0.expert_share": [0.25, 0.75]}
    assert scalars(tmp_path) == {
        "loss": [(1, 2.5), (2, 1.5)],
        "layers.0.expert_share/0": [(1, 0.25)],
        "layers.0.expert_share/1": [(1, 0.75)],
    }


def test_resume_drops_later_rows_and_an_unfinished_line(tmp_path: Path):
    with MetricsWriter(tmp_path) as writer:
        for step in (1, 2, 3):
            writer.write({"step": step, "loss": 10.0 + step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
    with MetricsWriter(tmp_path, last_step=2) as writer:
        writer.write({"step": 3, "loss": 0.5})
    assert [(row["step"], row["loss"]) for row in read_metrics(tmp_path)] == [(1, 11.0), (2, 12.0), (3, 0.5)]
    assert scalars(tmp_path)["loss"] == [(1, 11.0), (2, 12.0), (3, 0.5)]


def test_plain_lines_when_not_a_terminal():
    out = StringIO()
    with ProgressDisplay(Console(file=out, width=60)) as display:
        for i in range(100):
            display.show("training", i / 100, f"loss {i}")
        display.show("training", 1.0, "the end, told in a line of its own however narrow the page is [1]")
        display.say("[saved]")
    lines = out.getvalue().splitlines()
    assert lines == [
        "training   0%  loss 0",  # then none for some seconds
        "training 100%  the end, told in a line of its own however narrow the page is [1]",
        "[saved]",
    ]


def test_bar_on_a_terminal():
    out = StringIO()
    with ProgressDisplay(Console(file=out, force_terminal=True, width=100)) as display:
        display.show("training", 0.25, "loss 1.234")
        display._bar.refresh()
        display.show("evaluating", 0.5)
        display._bar.refresh()
        display.say("a line that stays")
    shown = out.getvalue()
    assert all(text in shown for text in ("training", "25%", "loss 1.234", "evaluating", "50%", "a line that stays"))


def test_duration():
    assert [duration(s) for s in (0.4, 59.6, 61, 3599, 3661)] == ["0:00", "1:00", "1:01", "59:59", "1:01:01"]
