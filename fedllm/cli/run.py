"""`fedllm run`: an experiment file with a progress display, and what to do next."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
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
    page, console = folder / "report.html", Console()
    again = _line(file, overrides, engine=engine, out=out, continues=continues)
    if status == "unfinished" and not resume:
        raise RunError(f"{folder} holds this experiment, unfinished; go on with:  {again}")
    try:
        with Display() as display:
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
    except Interrupted as stopped:
        print(f"fedllm: {stopped}; go on with:\n  {again}", file=sys.stderr)
        sys.exit(130)
    except RunError:
        if Folder(folder).finished and status != "finished":  # without a result, of which the page can tell more
            print(_reported(folder, page))
        raise
    told = f"Report: {page}" if status == "finished" and page.is_file() else _reported(folder, page)
    if status == "finished":
        print("This run is finished; its figures:")
    print_summary(result.summary, console)
    print(f"\n{told}")
    for step in next_steps(experiment, result.summary, folder) if alone else ():
        print(step)
    sys.stdout.flush()
    return result.summary


def _reported(folder: Path, page: Path) -> str:
    """Write the page and say where, or why not: a run is not lost for its report."""
    try:
        return f"Report: {write_report([folder], page)}"
    except Exception as error:
        return f"There is no report: {reason(error)}. Once that is mended:  fedllm report {shlex.quote(str(folder))}"


def _line(file: str, overrides: Sequence[str], *, engine: str, out: Path | None, continues: Path | None = None) -> str:
    """The line that goes on with a run."""
    chosen = [] if engine == "auto" else ["--engine", engine]
    place = [] if out is None else ["--out", str(out)]
    source = [] if continues is None else ["--continue", str(continues)]
    return shlex.join(["fedllm", "run", file, *overrides, *chosen, *place, *source, "--resume"])
