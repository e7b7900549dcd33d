"""`fedllm run`: an experiment file with a progress display, and what to do next."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from fedllm.cli.closing import next_steps
from fedllm.cli.display import Display, print_summary
from fedllm.config import find, load
from fedllm.errors import RunError
from fedllm.folder import Folder, default_folder
from fedllm.launch import Interrupted, run
from fedllm.report.page import write_report


def run_file(
    file: str, overrides: Sequence[str], *, engine: str, out: Path | None, resume: bool, alone: bool = True
) -> Mapping[str, Any]:
    """Run, show, report; the summary. Ctrl-C leaves a folder that can be resumed and prints the line that does so.

    `alone`: nothing runs after it, and the last lines say what to do next.
    """
    name = find(file).stem
    experiment = load(file, overrides)
    folder = out or default_folder(experiment, name)
    status = Folder(folder).status(experiment)
    again = _line(file, overrides, engine=engine, out=out)
    if status == "unfinished" and not resume:
        raise RunError(f"{folder} holds this experiment, unfinished; go on with:  {again}")
    try:
        with Display() as display:
            result = run(experiment, engine=engine, out=folder, resume=resume, name=name, listeners=(display,))
    except Interrupted as stopped:
        print(f"fedllm: {stopped}; go on with:\n  {again}", file=sys.stderr)
        sys.exit(130)
    page, console = folder / "report.html", Console()
    if status != "finished" or not page.is_file():
        write_report([folder], page)
    if status == "finished":
        print("This run is finished; its figures:")
    print_summary(result.summary, console)
    print(f"\nReport: {page}")
    for step in next_steps(experiment, result.summary, folder) if alone else ():
        print(step)
    sys.stdout.flush()
    return result.summary


def _line(file: str, overrides: Sequence[str], *, engine: str, out: Path | None) -> str:
    """The line that goes on with a run."""
    chosen = [] if engine == "auto" else ["--engine", engine]
    place = [] if out is None else ["--out", str(out)]
    return shlex.join(["fedllm", "run", file, *overrides, *chosen, *place, "--resume"])
