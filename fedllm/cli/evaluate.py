"""`fedllm eval`: score a finished run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from fedllm.cli import tables
from fedllm.errors import not_written
from fedllm.files import to_json_text
from fedllm.runs.evaluate import score_client, score_run, with_evaluation
from fedllm.runs.folder import write_whole
from fedllm.runs.loaded_run import open_run


def evaluate_run(folder: Path, overrides: Sequence[str], *, best: bool, client: str | None = None) -> None:
    """Print the scores of each client and of all, and keep them in `eval.json`.

    `client`: of its model alone, on its own records, on everybody else's and on all; kept in `eval-CLIENT.json`.
    """
    opened = open_run(folder, best=best, client=client)
    experiment = with_evaluation(opened.experiment, overrides)
    if client is None:
        scores, head, file = score_run(opened, experiment, _warn), "client", "eval.json"
    else:
        scores, head, file = score_client(opened, experiment, client, _warn), "records of", f"eval-{client}.json"
    names = list(scores["all"])
    rows = (
        [who, *(f"{figures[name]:.4f}" if name in figures else "" for name in names)] for who, figures in scores.items()
    )
    tables.show(Console(), [head, *names], rows, numbers=True)
    written = {"evaluation": asdict(experiment.evaluation), "round": opened.state.round, "scores": scores}
    try:
        write_whole(folder / file, to_json_text(written, indent=2) + "\n")
    except OSError as error:
        raise not_written(folder / file, error) from error


def _warn(text: str) -> None:
    Console(stderr=True).print(f"warning: {text}", highlight=False, markup=False, soft_wrap=True)
