"""Every experiment by name."""

from typing import Any

from statespan.errors import UnknownName
from statespan.lab import (
    costs,
    experts,
    hippo,
    induction_heads,
    jamba,
    mqar,
    noise,
    retrieval,
    selection,
    selective_copying,
    task_matrix,
    three_views,
)
from statespan.lab.experiment import Experiment

EXPERIMENTS: dict[str, Experiment[Any]] = {
    module.EXPERIMENT.name: module.EXPERIMENT
    for module in (
        three_views,
        hippo,
        selective_copying,
        induction_heads,
        mqar,
        task_matrix,
        costs,
        selection,
        jamba,
        experts,
        noise,
        retrieval,
    )
}


def find_experiment(name: str) -> Experiment[Any]:
    """The experiment called `name`; UnknownName with the nearest where there is none."""
    if name not in EXPERIMENTS:
        raise UnknownName("experiment", name, [*EXPERIMENTS, "all"])
    return EXPERIMENTS[name]
