"""`fedllm run`: an experiment file with a progress display, and what to do next."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from fedllm.cli.display import Display, print_summary
from fedllm.cli.next_steps import next_steps
from fedllm.errors import RunError, reason
from fedllm.experiment.config_file import find, load
from fedllm.report.page import write_report
from fedllm.runs.folder import Folder, default_folder
from fedllm.runs.launch import Interrupted, run

PAGE = "report.html"


def run_file(
    file: str,
    overrides: Sequence[str],
    *,
    engine: str,
    out: Path | None,
    resume: bool,
    continues: Path | None = None,
    began: float | None = None,
    alone: bool = True,
) -> Mapping[str, Any]:
    """Run, show, report; the summary. Ctrl-C leaves a folder that can be resumed and prints the line that does so.

    `alone`: nothing runs after it, and the last lines say what to do next.
    """
    name = find(file).stem
    experiment = load(file, overrides)
    folder = out or default_folder(experiment, name, continues)
    status = Folder(folder).status(experiment)
    again = _line(file, overrides, engine=engine, out=out, continues=continues)
    if status == "unfinished" and not resume:
        raise RunError(f"{folder} holds this experiment, unfinished; go on with:  {again}")
    with _reporting_on_stop(folder, again, was_finished=status == "finished"), Display() as display:
        result = run(
            experiment,
            engine=engine,
            out=folder,
            resume=resume,
            continues=continues,
            name=name,
            listeners=(display,),
            began=began,
        )
    _show(result.summary, folder, was_finished=status == "finished")
    for step in next_steps(experiment, result.summary, folder) if alone else ():
        print(step)
    sys.stdout.flush()
    return result.summary


@contextmanager
def _reporting_on_stop(folder: Path, again: str, *, was_finished: bool) -> Iterator[None]:
    """Print what a run that stops leaves behind: after Ctrl-C the line that goes on, after an error its report."""
    try:
        yield
    except Interrupted as stopped:
        print(f"fedllm: {stopped}; go on with:\n  {again}", file=sys.stderr)
        sys.exit(130)
    except RunError:
        if Folder(folder).finished and not was_finished:  # without a result, of which the report can tell more
            print(_reported(folder))
        raise


def _show(summary: Mapping[str, Any], folder: Path, *, was_finished: bool) -> None:
    """Print the figures and where the report is; a run that was finished before keeps the report that it has."""
    page = folder / PAGE
    told = f"Report: {page}" if was_finished and page.is_file() else _reported(folder)
    if was_finished:
        print("This run is finished; its figures:")
    print_summary(summary, Console())
    print(f"\n{told}")


def _reported(folder: Path) -> str:
    """Write the report and say where, or why not: a run is not lost for its report."""
    try:
        return f"Report: {write_report([folder], folder / PAGE)}"
    except Exception as error:
        return f"There is no report: {reason(error)}. Once that is mended:  fedllm report {shlex.quote(str(folder))}"


def _line(file: str, overrides: Sequence[str], *, engine: str, out: Path | None, continues: Path | None = None) -> str:
    """The line that goes on with a run."""
    chosen = [] if engine == "auto" else ["--engine", engine]
    place = [] if out is None else ["--out", str(out)]
    source = [] if continues is None else ["--continue", str(continues)]
    return shlex.join(["fedllm", "run", file, *overrides, *chosen, *place, *source, "--resume"])
