"""What a run would do, decided without loading a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedllm.aggregators.base import Aggregator
from fedllm.evaluation.scores import Scorer, check_metrics
from fedllm.experiment.checks.advice import advice
from fedllm.experiment.checks.check import check, check_profiles
from fedllm.experiment.checks.privacy import check_privacy
from fedllm.experiment.checks.secrecy import check_weights
from fedllm.experiment.config_file import dump, experiment_hash
from fedllm.experiment.record import Experiment
from fedllm.experiment.yaml import write_line
from fedllm.messages.traits import Fact
from fedllm.models.static_checks import check_task
from fedllm.runs.base_delta_cost import moving_line
from fedllm.runs.folder import default_folder
from fedllm.runs.privacy_words import privacy_lines


def preview(experiment: Experiment, path: Path) -> list[tuple[str, str]]:
    """The plan of an experiment in lines of (what, text), after all that can be decided without a model.

    Args:
        path: the experiment's file, which names the run.

    Raises:
        FedllmError: the experiment, its data or its clients are refused.
    """
    check(experiment)
    check_metrics(experiment.evaluation)
    check_task(experiment.task)
    population = experiment.federation.load(experiment.key)
    check_profiles(experiment, {client: experiment.federation.profile(client) for client in population.clients})
    sizes = {client: len(records) for client, records in population.train.items()}
    check_weights(experiment, sizes)
    private = check_privacy(experiment, sizes)
    Scorer.of(experiment.evaluation, experiment.work.max_length, population)
    data = population.report
    cohort = experiment.federation.sample(population.clients, 0, experiment.key)
    rounds = "one round" if experiment.rounds == 1 else f"the first of {experiment.rounds} rounds"
    settings = dump(experiment)
    lines = [
        ("experiment", f"{path.name}, hash {experiment_hash(experiment)[:8]}"),
        ("model", experiment.task.model),
        ("clients", f"{len(population.clients)}, {len(cohort)} in {rounds}"),
        ("records", f"{sum(data.train.values())} to train on, {sum(data.heldout.values())} held out"),
        ("server", _seen(experiment.aggregator)),
        ("adapter", write_line(_short(settings["task"]["adapter"]))),
        ("work", write_line(_short(settings["work"]))),
        ("stages", write_line([_short(stage) for stage in settings["stages"]])),
        ("folder", str(default_folder(experiment, path.stem))),
    ]
    lines += [] if private is None else privacy_lines(private)
    moving = moving_line(experiment, cohort)
    lines += [("frozen", moving)] if moving is not None else []
    lines += [("warning", f"the partition leaves out {data.left_out} records")] if data.left_out else []
    lines += [("warning", text) for text in advice(experiment, population)]
    return lines


def _short(component: Mapping[str, Any]) -> Any:
    """A component as a file may write it: its name alone, if it has no settings."""
    ((name, settings),) = component.items()
    return {name: dict(settings)} if settings else name


def _seen(aggregator: Aggregator) -> str:
    """What the server learns of the clients' updates, in words."""
    if Fact.HIDDEN not in aggregator.traits.loses:
        return "learns the sum of the clients' updates, and none of them alone"
    return "combines the clients' updates, and could read each of them"
