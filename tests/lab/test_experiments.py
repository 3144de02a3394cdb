"""Every experiment runs in its smallest setting, and its report knows the published figures from others."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from statespan.errors import UserError
from statespan.lab import costs, experts, hippo, induction_heads, jamba, mqar, noise, retrieval, selection, task_matrix
from statespan.lab import selective_copying as copying
from statespan.lab import three_views as views
from statespan.lab.experiment import Experiment, Row
from statespan.lab.results import read_units, results_path
from statespan.lab.session import LabOptions, run_experiment
from statespan.lab.text_training import TextSetting


def test_the_tiny_setting_runs(experiment: Experiment, tmp_path: Path, text: Path) -> None:
    setting = experiment.settings["tiny"]
    words = (f"text={text}",) if isinstance(setting, TextSetting) else ()
    page = run_experiment(experiment, LabOptions("tiny", tmp_path, assignments=words)).read_text()
    units = read_units(results_path(tmp_path, experiment.name, "tiny"))
    assert {unit.variant for unit in units} == set(setting.variants)
    assert all(unit.rows for unit in units)
    numbers = [v for unit in units for row in unit.rows for v in row.values() if isinstance(v, float)]
    assert numbers and all(abs(number) < 1e6 for number in numbers)
    assert (
        experiment.title in page
        and experiment.source in page
        and "| what must come out | here | published | came out |" in page
    )
    assert (tmp_path / f"{experiment.name}.tiny.png").stat().st_size > 5000


def test_units_are_the_same_when_run_again(experiment: Experiment, text: Path) -> None:
    """Rows follow from setting, variant and seed (but for times)."""
    setting = experiment.settings["tiny"]
    if isinstance(setting, TextSetting):
        setting = replace(setting, text=str(text))

    def rows(seed: int) -> list[Row]:
        found = experiment.run(setting, setting.variants[0], seed, lambda share, words: None)
        timed = ("ms", "us_per_token", "training_ms", "ms_per_token", "seconds")
        return [{key: value for key, value in row.items() if key not in timed} for row in found]

    first = rows(1)
    assert first == rows(1)
    assert json.loads(json.dumps(first)) == first
    if experiment.name not in ("costs", "three_views"):  # whose rows are times
        assert first != rows(2)


def test_settings_are_complete(experiment: Experiment) -> None:
    assert {"cpu", "h100", "tiny"} <= set(experiment.settings)
    for setting in experiment.settings.values():
        experiment.check_variants(setting.variants)
        assert setting.time
    assert any(place in experiment.settings["h100"].time for place in ("H100", "H200", "core"))
    assert "2 cores" in experiment.settings["cpu"].time
    assert set(experiment.notes) <= set(experiment.settings)


def answers(experiment: Experiment, rows: list[Row], setting: str = "h100") -> dict[str, bool | None]:
    return {check.text: check.passed for check in experiment.report(experiment.settings[setting], rows).checks}


def labelled(variant: str, *rows: Row, seed: int = 0) -> list[Row]:
    return [{"variant": variant, "seed": seed} | row for row in rows]


def copying_rows(figures: dict[str, float]) -> list[Row]:
    rows: list[Row] = []
    for variant, value in figures.items():
        rows += labelled(variant, {"final": value, "steps": 100, "parameters": 7}, {"step": 100, "accuracy": value})
    return rows


def induction_rows(figures: dict[str, Any]) -> list[Row]:
    rows: list[Row] = []
    for variant, values in figures.items():
        rows += labelled(variant, {"steps": 5, "parameters": 9}, {"step": 5, "loss": 0.1})
        for exponent, value in zip(range(6, 21), values, strict=False):
            rows += labelled(variant, {"length": 2**exponent, "accuracy": value, "rows": 16})
    return rows


def matrix_rows(figures: dict[str, tuple[float, float, float]]) -> list[Row]:
    rows: list[Row] = []
    for variant, values in figures.items():
        for task, value in zip(task_matrix.TASKS, values, strict=True):
            curve = {"task": task, "step": 5, "accuracy": value}
            rows += labelled(variant, curve, {"task": task, "final": value, "steps": 5})
    return rows


def mqar_rows(figures: dict[str, float]) -> list[Row]:
    return [row for v, value in figures.items() for row in labelled(v, {"num_pairs": 64, "accuracy": value})]


def trained_rows(figures: dict[str, float]) -> list[Row]:
    """As the experiments on text leave them; less is better."""
    rows: list[Row] = []
    for variant, value in figures.items():
        curve = [{"step": step, "bits_per_byte": value + 10 / step} for step in range(50, 1050, 50)]
        rows += labelled(variant, *curve, {"held_out": value, "parameters": 5})
    return rows


def noise_rows(growth: dict[str, tuple[float, float]]) -> list[Row]:
    rows: list[Row] = []
    for place, variant in enumerate(("bytes", "subwords")):
        rows += labelled(variant, {"noise": "clean", "bits_per_byte_of_noise": 1.0, "log_word_perplexity": 5.0})
        for name, both in growth.items():
            figures = {"bits_per_byte_of_noise": 2.0, "log_word_perplexity": 5.0 + both[place]}
            rows += labelled(variant, {"noise": name} | figures)
    return rows


def retrieval_rows(books: dict[str, list[float]], texts: dict[str, list[float]]) -> list[Row]:
    rows: list[Row] = []
    for variant, values in books.items():
        for count, value in zip((8, 16, 32, 64, 128, 256, 512), values, strict=True):
            rows += labelled(
                variant, {"task": "phonebook", "entries": count, "bytes": 9 * count, "right": value, "digits": value}
            )
    for variant, values in texts.items():
        for length, value in zip((512, 1024, 2048, 4096), values, strict=True):
            rows += labelled(
                variant, {"task": "needle", "bytes": length, "depth": 0.5, "right": value, "digits": value}
            )
    return rows


def cost_rows(exponents: dict[str, tuple[float, float]]) -> list[Row]:
    """Work of training of a row, and state, as powers of the length."""
    rows: list[Row] = []
    for variant, (training, state) in exponents.items():
        rows += labelled(variant, {"parameters": 3})
        for length in (4096, 8192, 16384):
            rows += labelled(variant, {"length": length, "us_per_token": length ** (training - 1)})
            rows += labelled(variant, {"context": length, "ms_per_token": 1.0, "state_kib": length**state})
    return rows


PUBLISHED_PERPLEXITY = selection.PUBLISHED
FLAT = {"lstm": (1.0, 0.0), "s4d": (1.1, 0.0), "mamba": (1.0, 0.0), "mamba2": (1.0, 0.0)}
HYBRID = {"attention": 1.0, "mamba": 1.0, "one_in_8": 0.97, "one_in_4": 0.971, "one_in_8_rope": 0.969}
BOUNDED = [
    row
    for norms, factor in ((True, 1.1), (False, 300.0))
    for scale, times in ((1.0, 1.0), (1000.0, factor))
    for row in labelled("outliers", {"norms": norms, "scale": scale, "dt": times, "B": 2 * times, "C": 3 * times})
]
EXPERTS = {"none": 3.72, "e1": 3.75, "e4": 3.72, "e8": 3.70, "e16": 3.68, "e32": 3.67}
PHONEBOOK = {"mamba": [9, 9, 0, 0, 0, 0, 0], "mamba2": [99, 50, 9, 0, 0, 0, 0], "hybrid": [99] * 6 + [90]}
PHONEBOOK_ROPE = PHONEBOOK | {"attention": [99, 99, 99, 99, 5, 0, 0]}
NEEDLE = {"hybrid": [99, 99, 99, 95], "attention": [99, 99, 10, 0]}

# experiment, rows that should pass every check, rows of which a check should fail
JUDGED: dict[str, tuple[Experiment, list[Row], list[Row]]] = {
    "copying": (
        copying.EXPERIMENT,
        copying_rows({"mamba": 99.8, "s4d_in_mamba": 56.4, "mamba_constant": 30.0}),
        copying_rows({"mamba": 99.8, "s4d_in_mamba": 80.0, "mamba_constant": 30.0}),
    ),
    "induction": (
        induction_heads.EXPERIMENT,
        induction_rows({k: induction_heads.PUBLISHED[k] for k in ("mamba", "attention_rope")}),
        induction_rows({"mamba": (100,) * 9 + (60,) * 6}),
    ),
    "induction, attention that holds": (
        induction_heads.EXPERIMENT,
        induction_rows({"mamba": (100,) * 15, "attention_rope": (100, 100, 100, 83, 31, 18, 9, 9, 6)}),
        induction_rows({"mamba": (100,) * 15, "attention_rope": (100,) * 9}),
    ),
    "mqar": (
        mqar.EXPERIMENT,
        mqar_rows({"attention": 98, "mamba2_n64": 96, "mamba2_n16": 70, "mamba_n16": 30, "hybrid_n16": 97}),
        mqar_rows({"attention": 98, "mamba2_n64": 96, "mamba2_n16": 20, "mamba_n16": 30, "hybrid_n16": 97}),
    ),
    "selection": (
        selection.EXPERIMENT,
        trained_rows(PUBLISHED_PERPLEXITY),
        trained_rows(PUBLISHED_PERPLEXITY | {"B": 9.0}),
    ),
    "jamba": (jamba.EXPERIMENT, trained_rows(HYBRID) + BOUNDED, trained_rows(HYBRID | {"one_in_8": 1.1}) + BOUNDED),
    "experts": (experts.EXPERIMENT, trained_rows(EXPERTS), trained_rows(EXPERTS | {"e1": 3.6})),
    "noise": (
        noise.EXPERIMENT,
        noise_rows(dict.fromkeys(noise.NOISES, (1.0, 2.0))),
        noise_rows(dict.fromkeys(noise.NOISES, (1.0, 2.0)) | {"swap": (2.0, 1.0)}),
    ),
    "retrieval": (
        retrieval.EXPERIMENT,
        retrieval_rows(PHONEBOOK_ROPE, NEEDLE),
        retrieval_rows(PHONEBOOK_ROPE | {"hybrid": [9, 0, 0, 0, 0, 0, 0]}, NEEDLE),
    ),
    "task matrix": (
        task_matrix.EXPERIMENT,
        matrix_rows({"mamba": (99, 98, 100), "s4d_in_mamba": (99, 50, 10), "lstm": (99, 99, 10)}),
        matrix_rows({"mamba": (99, 98, 100), "s4d_in_mamba": (99, 96, 10)}),
    ),
    "costs": (
        costs.EXPERIMENT,
        cost_rows(FLAT | {"transformer": (1.8, 1.0)}),
        cost_rows(FLAT | {"transformer": (1.8, 1.0), "mamba": (1.9, 0.0)}),
    ),
    "hippo": (
        hippo.EXPERIMENT,
        [
            row
            for measure in hippo.VARIANTS
            for n in (8, 16, 32, 64, 128, 256)
            for row in labelled(measure, {"state_size": n, "error": 1 / n, "stretched_error": 1 / n + 0.001})
        ],
        labelled("legs", {"state_size": 8, "error": 0.5, "stretched_error": 0.1}),
    ),
    "three views": (
        views.EXPERIMENT,
        [row for v in views.VARIANTS for row in labelled(v, {"difference": 1e-15}, {"length": 512, "ms": 1.0})],
        labelled("scan", {"difference": 1e-3}),
    ),
}


@pytest.mark.parametrize("name", JUDGED)
def test_the_report_judges(name: str) -> None:
    experiment, right, wrong = JUDGED[name]
    assert set(answers(experiment, right).values()) == {True}, answers(experiment, right)
    assert False in answers(experiment, wrong).values()


@pytest.mark.parametrize("name", JUDGED)
def test_what_is_missing_is_not_answered(name: str) -> None:
    """A report of one variant alone can be written, and claims no comparison."""
    experiment, right, _ = JUDGED[name]
    some = [row for row in right if row["variant"] == right[0]["variant"]]
    assert None in answers(experiment, some).values() or len(answers(experiment, some)) < len(
        answers(experiment, right)
    )


def test_speedup_is_the_share_of_steps() -> None:
    rows = trained_rows({"none": 2.0})
    faster = [{"step": step, "bits_per_byte": 2.0 + 10 / (2 * step)} for step in range(50, 1050, 50)]
    rows += labelled("e8", *faster, {"held_out": 1.9, "parameters": 5})
    found = experts.speedup(rows, "e8")
    assert found == pytest.approx(2.0, rel=0.15)
    assert experts.speedup(rows, "none") == 1.0
    assert experts.speedup(rows, "e32") is None


BAD = {
    "three_views": ("lengths=[0]", "lengths and compared_length must be at least 1"),
    "hippo": ("state_sizes=[1]", "state_sizes must be at least 2, got [1]"),
    "selective_copying": ("length=3", "selective_copying: length 3 has no place for num_tokens 8"),
    "induction_heads": ("test_exponents=[40]", "test_exponents must be 2 to 24, got [40]"),
    "mqar": ("num_pairs=[20]", "associative_recall: length 32 must be even and 4 num_pairs or more"),
    "costs": ("hidden_size=66", "num_heads 4 must divide hidden_size 66"),
    "task_matrix": ("length=2", "copying: length 2 has no place for num_tokens 3"),
    "selection": ("sequence_length=1", "sequence_length must be at least 2, got 1"),
    "jamba": ("num_layers=6", "num_layers must be a multiple of 8, the longest period, got 6"),
    "experts": ("steps=0", "steps must be at least 1, got 0"),
    "noise": ("share=1.5", "share must be above 0 and below 1, got 1.5"),
    "retrieval": ("haystack=4", "needle: length must be above 5, got 4"),
}


def test_sizes_that_cannot_work_get_one_line(experiment: Experiment, tmp_path: Path) -> None:
    word, message = BAD[experiment.name]
    with pytest.raises(UserError) as caught:
        run_experiment(experiment, LabOptions(folder=tmp_path, assignments=(word,)))
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
