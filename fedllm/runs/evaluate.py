"""Score a finished run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from fedllm.errors import ConfigError
from fedllm.evaluation.personal import added_up, sums_by_client
from fedllm.evaluation.scores import Scorer, check_metrics
from fedllm.experiment.config_file import override
from fedllm.experiment.record import Experiment
from fedllm.runs.loaded_run import LoadedRun
from fedllm.runs.personal_files import facts_of
from fedllm.runs.personalise import held_out_of
from fedllm.tensors import tree

Figures = dict[str, float]


def with_evaluation(experiment: Experiment, overrides: Sequence[str]) -> Experiment:
    """The experiment with other `evaluation` settings; a trained model has no other ones to change."""
    for change in overrides:
        if not change.startswith("evaluation."):
            raise ConfigError(f"'{change}' cannot change a run that is trained; only evaluation.KEY=VALUE can")
    evaluation = override(experiment, ["evaluation.best=null", *overrides]).evaluation
    check_metrics(evaluation)
    return replace(experiment, evaluation=evaluation)


def score_run(opened: LoadedRun, experiment: Experiment, warn: Callable[[str], None]) -> dict[str, Figures]:
    """Figures by client, each with its own parameters, and of all together. `warn` is told of records too long."""
    population = experiment.federation.load(experiment.key)
    scorer = Scorer.of(experiment.evaluation, experiment.work.max_length, population)
    for text in scorer.unfit(opened.model, population).warnings(scorer.max_length):
        warn(text)
    total: tree.Tree = {}
    scores: dict[str, Figures] = {}
    for client, records in population.heldout.items():
        sums = scorer.sums(opened.model, opened.params_of(client), records)
        scores[client] = scorer.figures(sums)
        total = tree.add(sums, total)
    return {**scores, "all": scorer.figures(total)}


def score_client(
    opened: LoadedRun, experiment: Experiment, client: str, warn: Callable[[str], None]
) -> dict[str, Figures]:
    """Figures of one client's model: on its own held-out records, on the other clients', and on all of them. One who
    came after the run is scored on the records that it held out; a part without records is left out."""
    population = experiment.federation.load(experiment.key)
    if client not in population.heldout:
        own = held_out_of(opened.experiment, facts_of(opened.folder, client), client)
        population = replace(population, heldout={**population.heldout, client: own})
    scorer = Scorer.of(experiment.evaluation, experiment.work.max_length, population)
    for text in scorer.unfit(opened.model, population).warnings(scorer.max_length):
        warn(text)
    sums = sums_by_client(scorer, opened.model, opened.params_of(client), population.heldout)
    parts = {"its own": [client], "others": [who for who in sums if who != client], "all": list(sums)}
    found = {name: scorer.figures(added_up(sums, who)) for name, who in parts.items()}
    return {name: figures for name, figures in found.items() if figures}
