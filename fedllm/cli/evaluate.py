"""`fedllm eval`, `export` and `report`: verbs on finished runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from fedllm.cli import tables
from fedllm.files import not_written, to_json_text
from fedllm.runs.evaluate import _evaluated_as, _scores
from fedllm.runs.folder import write_whole
from fedllm.runs.loaded_run import open_run


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
