"""`fedllm eval`, `export` and `report`: verbs on finished runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console

from fedllm import tree
from fedllm.cli import tables
from fedllm.config import override
from fedllm.disk import not_written
from fedllm.errors import ConfigError
from fedllm.evaluation.scores import Scorer, check_metrics
from fedllm.experiment import Experiment
from fedllm.export import export
from fedllm.finished import Opened, open_run
from fedllm.folder import write_whole
from fedllm.jsontext import to_json_text
from fedllm.report.page import write_report

Figures = dict[str, float]


def evaluate_run(folder: Path, overrides: Sequence[str], *, best: bool) -> None:
    """Print the scores of each client and of all, and keep them in `eval.json`."""
    opened = open_run(folder, best=best)
    experiment = _evaluated_as(opened.experiment, overrides)
    scores = _scores(opened, experiment)
    names = list(scores["all"])
    rows = (
        [client, *(f"{figures[name]:.4f}" if name in figures else "" for name in names)]
        for client, figures in scores.items()
    )
    tables.show(Console(), ["client", *names], rows, numbers=True)
    written = {"evaluation": asdict(experiment.evaluation), "round": opened.state.round, "scores": scores}
    try:
        write_whole(folder / "eval.json", to_json_text(written, indent=2) + "\n")
    except OSError as error:
        raise not_written(folder / "eval.json", error) from error


def export_run(folder: Path, *, to: str, out: Path | None, client: str | None) -> None:
    """Write the model and say where."""
    print(f"written: {export(folder, to, out=out, client=client)}")


def report_runs(folders: Sequence[Path], *, out: Path | None) -> None:
    """Write the page and say where."""
    print(f"written: {write_report(folders, out or folders[0] / 'report.html')}")


def _evaluated_as(experiment: Experiment, overrides: Sequence[str]) -> Experiment:
    """The experiment with other `evaluation` settings; a trained model has no other ones to change."""
    for change in overrides:
        if not change.startswith("evaluation."):
            raise ConfigError(f"'{change}' cannot change a run that is trained; only evaluation.KEY=VALUE can")
    evaluation = override(experiment, ["evaluation.best=null", *overrides]).evaluation
    check_metrics(evaluation)
    return replace(experiment, evaluation=evaluation)


def _scores(opened: Opened, experiment: Experiment) -> dict[str, Figures]:
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
