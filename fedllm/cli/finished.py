"""`fedllm eval`, `export` and `report`: verbs on finished runs."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fedllm.config import override
from fedllm.errors import RunError
from fedllm.evaluation.scores import Scorer, check_metrics
from fedllm.export import export
from fedllm.finished import open_run
from fedllm.folder import Folder
from fedllm.report.page import write_report


def evaluate_run(folder: Path, overrides: list[str], *, best: bool) -> None:
    """Print the scores of each client and of all, and keep them in `eval.json`."""
    opened = open_run(folder, best=best)
    experiment = replace(opened.experiment, evaluation=override(opened.experiment, overrides).evaluation)
    check_metrics(experiment.evaluation)
    population = experiment.federation.load(experiment.key)
    scorer = Scorer.of(experiment, population)
    scores: dict[str, dict[str, float]] = {}
    for client, records in population.heldout.items():
        params = open_run(folder, client=client, best=best).params if opened.personal(client) else opened.params
        scores[client] = scorer.figures(scorer.sums(opened.model, params, records))
    everything = [record for records in population.heldout.values() for record in records]
    scores["all"] = scorer.figures(scorer.sums(opened.model, opened.params, everything))
    names = list(scores["all"])
    table = Table("client", *names, box=None, header_style="bold", pad_edge=False)
    for client, figures in scores.items():
        table.add_row(client, *(f"{figures[name]:.4f}" if name in figures else "" for name in names))
    Console().print(table)
    written = {"evaluation": asdict(experiment.evaluation), "round": opened.state.round, "scores": scores}
    (folder / "eval.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


def export_run(folder: Path, *, to: str, out: Path | None, client: str | None) -> None:
    """Write the model and say where."""
    place = export(open_run(folder, client=client), to, out or folder / f"export-{to}")
    Console().print(f"written: {place}", highlight=False, soft_wrap=True)


def report_runs(folders: list[Path], *, out: Path | None) -> None:
    """Write the page and say where."""
    for folder in folders:
        if not Folder(folder).events.is_file():
            raise RunError(f"{folder} is no run folder (it has no events.jsonl)")
    page = write_report(folders, out or folders[0] / "report.html")
    Console().print(f"written: {page}", highlight=False, soft_wrap=True)
