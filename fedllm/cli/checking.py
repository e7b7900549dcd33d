"""`fedllm check`: what an experiment would do, without loading a model."""

from __future__ import annotations

from rich.console import Console

from fedllm.check import check
from fedllm.config import experiment_hash, find, load
from fedllm.evaluation.scores import check_metrics
from fedllm.folder import default_folder


def check_file(file: str, overrides: list[str]) -> None:
    """Check the settings and the data; print the plan."""
    experiment = load(file, overrides)
    check(experiment)
    check_metrics(experiment.evaluation)
    population = experiment.federation.load(experiment.key)
    data, cohort = population.report, experiment.federation.sample(population.clients, 0, experiment.key)
    stages = ", ".join(str(stage) for stage in experiment.trip)
    lines = {
        "experiment": f"{find(file).name}, hash {experiment_hash(experiment)[:8]}",
        "model": f"{experiment.task.model}, {experiment.task.adapter}",
        "clients": f"{len(population.clients)}, {len(cohort)} in round 0 of {experiment.rounds}",
        "records": f"{sum(data.train.values())} to train on, {sum(data.heldout.values())} held out",
        "stages": stages,
        "aggregator": f"{experiment.aggregator} (sees {experiment.aggregator.sees})",
        "work": str(experiment.work),
        "folder": str(default_folder(experiment, find(file).stem)),
    }
    console = Console()
    for name, text in lines.items():
        console.print(f"{name:11} {text}", highlight=False, soft_wrap=True, markup=False)
    if data.left_out:
        console.print(f"warning     the split leaves out {data.left_out} records", highlight=False)
    console.print("ok", highlight=False)
