"""Every experiment in its CPU setting, a minute or so each: `pytest -m lab`."""

from pathlib import Path

import pytest

from statespan.lab.experiment import Experiment
from statespan.lab.pages import findings_of
from statespan.lab.results import read_units, results_path
from statespan.lab.session import LabOptions, run_experiment

# What comes out at this size with every seed; the rest of a page's checks need the H100 setting.
HOLDS = {
    "three_views": ("convolution equals the recurrence", "scan equals the recurrence"),
    "hippo": ("legs: the error falls", "legt: the error falls", "lagt: the error falls", "legs: stretching"),
    "mqar": ("one layer of attention closes the gap",),
    "costs": ("mamba: memory of the state does not grow", "transformer: the cache grows like the tokens"),
    "jamba": ("norms: an outlier", "without norms"),
}


@pytest.mark.lab
def test_the_cpu_setting_runs(experiment: Experiment, tmp_path: Path) -> None:
    page = run_experiment(experiment, LabOptions("cpu", tmp_path))
    assert "On a CPU" in page.read_text()
    units = read_units(results_path(tmp_path, experiment.name, "cpu"))
    checks = findings_of(experiment, "cpu", units).checks
    for beginning in HOLDS.get(experiment.name, ()):
        found = [check.passed for check in checks if check.text.startswith(beginning)]
        assert found and all(found), beginning
