"""Score a finished run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console

from fedllm.errors import ConfigError
from fedllm.evaluation.scores import Scorer, check_metrics
from fedllm.experiment.config_file import override
from fedllm.experiment.record import Experiment
from fedllm.runs.loaded_run import LoadedRun
from fedllm.tensors import tree

Figures = dict[str, float]


def _evaluated_as(experiment: Experiment, overrides: Sequence[str]) -> Experiment:
    """The experiment with other `evaluation` settings; a trained model has no other ones to change."""
    for change in overrides:
        if not change.startswith("evaluation."):
            raise ConfigError(f"'{change}' cannot change a run that is trained; only evaluation.KEY=VALUE can")
    evaluation = override(experiment, ["evaluation.best=null", *overrides]).evaluation
    check_metrics(evaluation)
    return replace(experiment, evaluation=evaluation)


def _scores(opened: LoadedRun, experiment: Experiment) -> dict[str, Figures]:
    """Figures by client, each with its own leaves, and of all together."""
    population = experiment.federation.load(experiment.key)
    scorer = Scorer.of(experiment, population)
    for text in scorer.unfit(opened.model, population).warnings(scorer.max_length):
        Console(stderr=True).print(f"warning: {text}", highlight=False, markup=False, soft_wrap=True)
    total: tree.Tree = {}
    scores: dict[str, Figures] = {}
    for client, records in population.heldout.items():
        sums = scorer.sums(opened.model, opened.params_of(client), records)
        scores[client] = scorer.figures(sums)
        total = tree.add(sums, total)
    return {**scores, "all": scorer.figures(total)}
