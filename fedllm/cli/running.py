"""`fedllm run`: an experiment file with a progress display, and what to do next."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from fedllm.cli.display import Display, print_summary
from fedllm.config import find, load
from fedllm.errors import FedllmError
from fedllm.folder import Folder, default_folder
from fedllm.launch import Interrupted, run
from fedllm.report.page import write_report


def run_file(file: str, overrides: list[str], *, engine: str, out: Path | None, resume: bool) -> None:
    """Run, show, report. Ctrl-C leaves a folder that can be resumed and prints the line that does so."""
    name = find(file).stem
    experiment = load(file, overrides)
    folder = out or default_folder(experiment, name)
    finished = Folder(folder).finished
    again = " ".join(["fedllm run", file, *overrides, *(["--out", str(out)] if out else []), "--resume"])
    console = Console()
    try:
        with Display() as display:
            result = run(experiment, engine=engine, out=folder, resume=resume, name=name, listeners=(display,))
    except Interrupted as stopped:
        print(f"fedllm: {stopped}; go on with:\n  {again}", file=sys.stderr)
        sys.exit(130)
    except FedllmError as error:
        if Folder(folder).started and not finished and not resume and "unfinished" in str(error):
            raise type(error)(f"{error}:  {again}") from error
        raise
    page = folder / "report.html"
    if not page.is_file():
        write_report([folder], page)
    if finished:
        console.print("This run is finished; its figures:", highlight=False)
    print_summary(result.summary, console)
    console.print(f"\nReport: {page}", highlight=False, soft_wrap=True)
    console.print(f"Chat with the tuned model:  fedllm chat {folder} --compare", highlight=False, soft_wrap=True)
    console.print(
        "Run on your own data:       fedllm run own-data federation.shards.data=my.jsonl",
        highlight=False,
        soft_wrap=True,
    )
