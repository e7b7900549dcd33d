"""Kill runs with SIGKILL and resume them, in forked children of one process that has imported everything.

    python -m tests.runs.kill_driver SPEC.json FOLDER

Prints JSON: the run that was not killed, and each one that was.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fedllm
from fedllm.events import CheckpointSaved, Evaluated, Event, RoundFinished, RunFinished, to_json
from fedllm.runs.event_log import Log
from tests.runs.small import adapter_hash, events, figures, history, rounds_run_again

OTHERS = 8
SEAMS = (Evaluated, RoundFinished, CheckpointSaved, RunFinished)
Fault = Callable[[], None]


def main(spec: Path, folder: Path) -> dict[str, Any]:
    """Run once whole, then kill at events spread over the run, and within its writes."""
    os.environ["FEDLLM_CACHE"] = str(folder / "cache")
    os.fsync = lambda handle: None  # a killed process takes no written page along
    torch.set_num_threads(1)
    settings = json.loads(spec.read_text(encoding="utf-8"))
    fedllm.run(fedllm.build(settings), out=folder / "whole", name="small")
    whole = {**seen(folder / "whole"), "events": len(events(folder / "whole"))}
    gc.freeze()  # else each child copies the pages of all objects, for its collector marks them
    faults: list[tuple[dict[str, Any], Fault]] = []
    for count, kind in chosen(events(folder / "whole")):
        faults.append(({"name": f"{kind} event {count}", "event": count}, at_event(count, kind)))
    for start, count in (("round-", 0), ("round-", 2), ("00000", 4), ("adapter", 0), ("summary.json", 0)):
        faults.append(({"name": f"rename of {start}"}, at_rename(start, count)))
    return {"whole": whole, "kills": [kill(settings, folder / f"run{n}", *fault) for n, fault in enumerate(faults)]}


def chosen(log: list[Event]) -> list[tuple[int, str]]:
    """Before every event that follows a checkpoint's write; after, and within the line of, some of the others."""
    seams = [place for place, event in enumerate(log) if isinstance(event, SEAMS)]
    others = [place for place in range(len(log)) if place not in seams]
    spread = [others[number * (len(others) - 1) // (OTHERS - 1)] for number in range(OTHERS)]
    return [(place, "before") for place in seams] + [(p, ("after", "within")[n % 2]) for n, p in enumerate(spread)]


def kill(settings: dict[str, Any], out: Path, about: dict[str, Any], fault: Fault) -> dict[str, Any]:
    """Run in a child with a fault, resume in another without."""

    def faulty() -> None:
        fault()
        fedllm.run(fedllm.build(settings), out=out, name="small")

    code = in_child(faulty)
    if (resumed := in_child(lambda: fedllm.run(fedllm.build(settings), out=out, name="small", resume=True))) != 0:
        raise RuntimeError(f"{about['name']}: the resumed run ended with {resumed}")
    return {**about, "signal": -code, **seen(out)}


def seen(folder: Path) -> dict[str, Any]:
    """What the runs are compared by."""
    told = json.loads(json.dumps(history(folder)))
    found = {"adapter": adapter_hash(folder), "figures": figures(folder), "history": told}
    return {**found, "again": rounds_run_again(folder)}


def in_child(action: Callable[[], object]) -> int:
    """The exit code of a child; minus the signal that killed it."""
    child = os.fork()
    if child == 0:
        try:
            action()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_event(count: int, kind: str) -> Fault:
    """Die before the event with this index is written, after it, or with half of its line on the disk."""

    def fault() -> None:
        write, left = Log.__call__, [count]

        def counted(log: Log, event: Event) -> None:
            left[0] -= 1
            if left[0] >= 0:
                return write(log, event)
            if kind == "within":
                with Path(log._path or "").open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"at": 0.0, **to_json(event)})[:-7])
            elif kind == "after":
                write(log, event)
            return die()

        Log.__call__ = counted  # type: ignore[method-assign,assignment]

    return fault


def at_rename(start: str, count: int) -> Fault:
    """Die when a file or folder whose name begins like this is written and is about to be renamed into place."""

    def fault() -> None:
        replace, left = os.replace, [count]

        def counted(source: Any, target: Any) -> None:
            if Path(target).name.startswith(start):
                left[0] -= 1
                if left[0] < 0:
                    die()
            replace(source, target)

        os.replace = counted  # type: ignore[assignment]
        Path.replace = counted  # type: ignore[method-assign,assignment]

    return fault


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]))))
