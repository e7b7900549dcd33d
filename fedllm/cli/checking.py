"""`fedllm check`: what an experiment would do, without loading a model."""

from __future__ import annotations

from collections.abc import Sequence

from fedllm.check import check, check_profiles
from fedllm.cli.moving import moving_line
from fedllm.config import experiment_hash, find, load
from fedllm.evaluation.scores import Scorer, check_metrics
from fedllm.folder import default_folder


def check_file(file: str, overrides: Sequence[str]) -> None:
    """Check the settings and the data; print the plan."""
    experiment, path = load(file, overrides), find(file)
    check(experiment)
    check_metrics(experiment.evaluation)
    population = experiment.federation.load(experiment.key)
    check_profiles(experiment, {client: experiment.federation.profile(client) for client in population.clients})
    Scorer.of(experiment, population)
    data = population.report
    cohort = experiment.federation.sample(population.clients, 0, experiment.key.fold("cohort", 0))
    lines = {
        "experiment": f"{path.name}, hash {experiment_hash(experiment)[:8]}",
        "model": f"{experiment.task.model}, {experiment.task.adapter}",
        "clients": f"{len(population.clients)}, {len(cohort)} in the first of {experiment.rounds} rounds",
        "records": f"{sum(data.train.values())} to train on, {sum(data.heldout.values())} held out",
        "stages": ", ".join(str(stage) for stage in experiment.trip),
        "aggregator": f"{experiment.aggregator} (sees {experiment.aggregator.sees})",
        "work": str(experiment.work),
        "folder": str(default_folder(experiment, path.stem)),
    }
    moving = moving_line(experiment, cohort)
    if moving is not None:
        lines["frozen"] = moving
    if data.left_out:
        lines["warning"] = f"the split leaves out {data.left_out} records"
    for name, text in lines.items():
        print(f"{name:11} {text}")
    print("ok")
