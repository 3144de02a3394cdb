"""Units run once, are kept as they finish, merged from other folders, and told on a page."""

import json
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from threading import Barrier, Event

import pytest

from statespan.errors import UnknownName, UserError
from statespan.lab.experiment import Experiment, Progress, Row, Setting
from statespan.lab.pages import write_index
from statespan.lab.results import read_units, results_path
from statespan.lab.session import LabOptions, run_experiment

Calls = list[tuple[str, int]]


@pytest.fixture
def options(tmp_path: Path) -> LabOptions:
    return LabOptions(folder=tmp_path / "out", command="statespan lab toy")


def test_every_unit_runs_once(toy: Experiment, calls: Calls, options: LabOptions) -> None:
    page = run_experiment(toy, options)
    assert calls == [("one", 0), ("two", 0), ("one", 1), ("two", 1)]
    assert page == options.folder / "toy.md"
    run_experiment(toy, options)
    assert len(calls) == 4
    run_experiment(toy, replace(options, seeds=3))
    assert calls[4:] == [("one", 2), ("two", 2)]


def test_an_interrupted_run_goes_on(toy: Experiment, calls: Calls, options: LabOptions) -> None:
    def breaks(*arguments: object) -> list[dict[str, int]]:
        calls.append(("broken", 0))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return [{"value": 5}]

    with pytest.raises(KeyboardInterrupt):
        run_experiment(replace(toy, run=breaks), options)
    path = results_path(options.folder, "toy", "cpu")
    assert [(unit.variant, unit.seed) for unit in read_units(path)] == [("one", 0), ("two", 0)]
    with path.open("a") as file:
        file.write('{"variant": "one", "seed": 1, "rows": [{"val')  # as a full disk leaves it
    calls.clear()
    run_experiment(toy, options)
    assert calls == [("one", 1), ("two", 1)]
    assert len(read_units(path)) == 4
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_units_side_by_side_are_those_one_after_the_other(toy: Experiment, options: LabOptions) -> None:
    """Each waits for another to be running too."""
    together = Barrier(2, timeout=60)

    def waits(setting: Setting, variant: str, seed: int, progress: Progress) -> Iterable[Row]:
        together.wait()
        return toy.run(setting, variant, seed, progress)

    run_experiment(toy, options)
    beside = replace(options, folder=options.folder / "beside", jobs=2)
    text = run_experiment(replace(toy, run=waits), beside).read_text()
    assert "in 4 units, up to 2 of them side by side" in text
    rows = [
        {(unit.variant, unit.seed): unit.rows for unit in read_units(results_path(folder, "toy", "cpu"))}
        for folder in (options.folder, beside.folder)
    ]
    assert rows[0] == rows[1] and len(rows[0]) == 4


def test_a_broken_unit_ends_those_beside_it(toy: Experiment, calls: Calls, options: LabOptions) -> None:
    """And no other begins."""
    together, stopped = Barrier(2, timeout=60), Event()

    def breaks(setting: Setting, variant: str, seed: int, progress: Progress) -> Iterable[Row]:
        calls.append((variant, seed))
        together.wait()
        if variant == "one":
            raise UserError("broken")
        try:
            for _ in range(6000):
                progress(0.1, "")
                time.sleep(0.01)
        finally:
            stopped.set()
        return [{"value": 1}]

    with pytest.raises(UserError, match="broken"):
        run_experiment(replace(toy, run=breaks), replace(options, jobs=2))
    assert stopped.is_set() and sorted(calls) == [("one", 0), ("two", 0)]
    assert read_units(results_path(options.folder, "toy", "cpu")) == []


def test_what_is_timed_runs_alone(toy: Experiment, calls: Calls, options: LabOptions) -> None:
    page = run_experiment(replace(toy, timed=True), replace(options, jobs=4))
    assert calls == [("one", 0), ("two", 0), ("one", 1), ("two", 1)] and "side by side" not in page.read_text()


def test_the_page_says_everything(toy: Experiment, options: LabOptions) -> None:
    text = run_experiment(toy, options).read_text()
    for part in (
        "# A toy",
        "Source: nowhere",
        "| a value there is | 30 | 31 | yes |",
        "| larger than 99 |  |  | NO |",
        "| ? |  |  | not answered |",
        "A note.",
        "![A toy](toy.cpu.png)",
        "| one | 30.00 |",
        "| two | 31.00 |",
        "command: `statespan lab toy`",
        "seeds: 0 1\n",
        "PyTorch",
        "sizes: size=3",
        "statespan lab toy --setting h100    # none either",
    ):
        assert part in text, part
    assert (options.folder / "toy.cpu.png").read_bytes().startswith(b"\x89PNG")


def test_the_index_counts_the_checks(toy: Experiment, options: LabOptions) -> None:
    run_experiment(toy, options)
    write_index(options.folder, {"toy": toy, "other": replace(toy, name="other", title="Another")})
    text = (options.folder / "index.md").read_text()
    assert "| [A toy](toy.md) (`toy`) | Toys work | 1 of 2 checks | not run; takes none either |" in text
    assert "| Another (`other`) | Toys work | not run; takes no time | not run; takes none either |" in text
    assert "| A toy | a value there is | 30 | 31 | yes |" in text and "| A toy | larger than 99 |  |  | NO |" in text


def test_the_index_tells_claims_of_the_largest_setting_with_reasons(toy: Experiment, options: LabOptions) -> None:
    run_experiment(toy, options)
    run_experiment(replace(toy, settings={"h100": toy.settings["cpu"]}), replace(options, setting="h100", seeds=1))
    write_index(options.folder, {"toy": toy})
    text = (options.folder / "index.md").read_text()
    assert (
        text.count("| A toy | larger than 99 |") == 1 and "| A toy | larger than 99 |  |  | NO: it is small |" in text
    )


def test_results_of_other_folders_are_merged(
    toy: Experiment, calls: Calls, options: LabOptions, tmp_path: Path
) -> None:
    for name, variant in (("a", "one"), ("b", "two")):
        run_experiment(toy, replace(options, folder=tmp_path / name, only=(variant,)))
    calls.clear()
    merging = replace(options, merge=(tmp_path / "a", tmp_path / "b"))
    text = run_experiment(toy, merging).read_text()
    assert calls == []
    assert text.count("| one | 3") == 2 and text.count("| two | 3") == 2
    with pytest.raises(UserError, match="no such folder to merge"):
        run_experiment(toy, replace(options, merge=(tmp_path / "c",)))


def test_a_report_runs_nothing(toy: Experiment, calls: Calls, options: LabOptions) -> None:
    run_experiment(toy, replace(options, only=("two",), seeds=1))
    calls.clear()
    text = run_experiment(toy, replace(options, report_only=True)).read_text()
    assert calls == [] and "| two | 30.00 |" in text


def test_results_of_other_sizes_are_refused(toy: Experiment, options: LabOptions) -> None:
    run_experiment(toy, options)
    with pytest.raises(UserError, match="holds results with size=3, and now it is 4; name another folder with --out"):
        run_experiment(toy, replace(options, assignments=("size=4",)))


def test_bad_input_gets_one_line(toy: Experiment, options: LabOptions, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    results_path(foreign, "toy", "cpu").write_text('{"no": "result"}\n')
    for changed, message in (
        (replace(options, setting="h10"), "unknown setting of toy: 'h10'; did you mean 'h100'?"),
        (replace(options, only=("ones",)), "unknown variant of toy: 'ones'; did you mean 'one'?"),
        (replace(options, assignments=("sise=4",)), "unknown key in ToySetting: 'sise'; did you mean 'size'?"),
        (replace(options, assignments=("seeds=0",)), "seeds must be at least 1, got 0"),
        (replace(options, folder=file), f"{file} is a file; name a folder with --out"),
        (replace(options, folder=file / "below"), f"{file / 'below'} cannot be written: Not a directory"),
        (replace(options, folder=foreign), "line 1 is no result of the lab"),
    ):
        with pytest.raises(UserError) as caught:
            run_experiment(toy, changed)
        assert message in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UnknownName):
        run_experiment(toy, replace(options, setting="x"))
