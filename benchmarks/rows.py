"""The rows of the benchmark of a round: the commands of each, of which the fastest counts.

A command is run until its two best runs are near each other: what else a machine does only takes speed away, so a best
run that a second one confirms is the command's own.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from os import environ
from pathlib import Path
from typing import Any

from peak import cores

from fedllm.errors import ConfigError, RunError

HERE = Path(__file__).resolve().parent
PEERS = HERE.parent / ".venv-peers"
PAIRS = 3  # measurements of two runs at once
STEADY = 0.1  # how far the second best run may be below the best

Figures = dict[str, Any]


@dataclass(frozen=True)
class Prepared:
    """Files that all rows read. `model`: a folder in transformers' layout; `tail`: the peers' arguments; `device`: of
    the rows without peers; `dtype`: what all rows but peer_shipped compute in; `runs`: of a command, at most."""

    experiment: Path
    batches: Path
    model: Path
    tail: tuple[str, ...]
    device: str = "cpu"
    dtype: str = "float32"
    runs: int = 1


@dataclass(frozen=True)
class Command:
    """One way of running a row. `title` says what is special about it."""

    title: str
    words: tuple[str, ...]
    variables: tuple[tuple[str, str], ...] = field(default=())


def peer_shipped(prepared: Prepared) -> list[Command]:
    """Flower + TRL + PEFT as its users start it: float32, one client at a time, on all cores."""
    return [_flowertune(prepared, "float32", cores(), keep=False)]


def peer(prepared: Prepared) -> list[Command]:
    """The same stack with what makes it faster: the processor's own type, a client per core, and the model kept from
    client to client."""
    ways = dict.fromkeys([("float32", 1), (prepared.dtype, cores()), (prepared.dtype, 1)])
    return [*peer_shipped(prepared), *(_flowertune(prepared, dtype, cpus, keep=True) for dtype, cpus in ways)]


def trl(prepared: Prepared) -> list[Command]:
    """TRL's SFTTrainer loop alone, on all cores."""
    settings = ("--dtype", prepared.dtype, "--threads", str(cores()))
    return [_script(prepared, "trl_loop", PEERS / "bin" / "python", *settings)]


def plain(prepared: Prepared) -> list[Command]:
    """PyTorch + PEFT on one thread and on all cores, or on a GPU."""
    threads = sorted({1, cores()}) if prepared.device == "cpu" else [1]
    ways = [("--dtype", prepared.dtype, "--threads", str(n), "--device", prepared.device) for n in threads]
    return [_script(prepared, "plain", Path(sys.executable), *way) for way in ways]


def serial(prepared: Prepared) -> list[Command]:
    """fedllm, one client after another, one thread."""
    return [_federated(prepared, "serial")]


def batched(prepared: Prepared) -> list[Command]:
    """fedllm on all cores."""
    return [_federated(prepared, "batched")]


ROWS: Mapping[str, Callable[[Prepared], list[Command]]] = {
    row.__name__: row for row in (peer_shipped, peer, trl, plain, serial, batched)
}
NEED_PEERS = ("peer_shipped", "peer", "trl")


def check_peers(rows: list[str]) -> None:
    """Raises ConfigError: a row needs the peers, and they are not installed."""
    wanted = [row for row in rows if row in NEED_PEERS]
    if wanted and not (PEERS / ".fedllm-peers").is_file():
        raise ConfigError(f"{', '.join(wanted)}: the peers are not installed; install them with scripts/peers")


def measure(row: str, prepared: Prepared) -> Figures:
    """The figures of the best run of a row's fastest command, and its title as `way`; one that was run before is not
    run again. `runs`: the speeds of all runs of that command; `spread`: see `spread`.

    Raises:
        RunError: a command failed.
    """
    ways = [{**_steady(command, prepared.runs), "way": command.title} for command in ROWS[row](prepared)]
    return max(ways, key=_speed)


def spread(speeds: Sequence[float]) -> float | None:
    """How far the second best is below the best, as a share of it; None of a single one."""
    if len(speeds) < 2:
        return None
    second, best = sorted(speeds)[-2:]
    return 1 - second / best


def pair(prepared: Prepared) -> float:
    """Two batched runs at once, together over one alone; the median of three.

    Raises:
        RunError: a run failed.
    """
    (command,) = batched(prepared)
    ratios = []
    for _ in range(PAIRS):
        alone = _finished(_started(command), command)["mean_client_steps_per_s"]
        with tempfile.TemporaryDirectory() as folder:
            met = Command(command.title, (*command.words, "--meet", folder))
            both = [_started(met), _started(met)]
            together = sum(_finished(process, met)["mean_client_steps_per_s"] for process in both)
        ratios.append(together / alone)
    return statistics.median(ratios)


def _flowertune(prepared: Prepared, dtype: str, cpus: int, *, keep: bool) -> Command:
    """A client per core means one OpenMP thread in each process, which Flower leaves to the user."""
    one_thread = (("OMP_NUM_THREADS", "1"),) if cpus == 1 else ()
    settings = ["--dtype", dtype, "--cpus", str(cpus), *(["--keep"] if keep else [])]
    return _script(prepared, "flowertune", PEERS / "bin" / "python", *settings, variables=one_thread)


def _script(
    prepared: Prepared, name: str, python: Path, *settings: str, variables: tuple[tuple[str, str], ...] = ()
) -> Command:
    files = (str(prepared.model), str(prepared.batches))
    words = (str(python), str(HERE / "peers" / f"{name}.py"), *files, *prepared.tail, *settings)
    return Command(" ".join([name, *settings]), words, variables)


def _federated(prepared: Prepared, engine: str) -> Command:
    return Command(engine, (sys.executable, str(HERE / "federated.py"), str(prepared.experiment), engine))


@cache
def _steady(command: Command, most: int) -> Figures:
    """The best run of at most so many. A command ends sooner when its two best are near each other."""
    runs: list[Figures] = []
    while len(runs) < most and not (runs and is_steady(list(map(_speed, runs)))):
        runs.append(_finished(_started(command), command))
    speeds = list(map(_speed, runs))
    return {**max(runs, key=_speed), "runs": speeds, "spread": spread(speeds)}


def is_steady(speeds: Sequence[float]) -> bool:
    """Whether a second run confirms the best one."""
    found = spread(speeds)
    return found is not None and found < STEADY


def _speed(figures: Figures) -> float:
    speed: float = figures["client_steps_per_s"]
    return speed


def _started(command: Command) -> subprocess.Popen[str]:
    variables = {name: value for name, value in environ.items() if name != "OMP_NUM_THREADS"}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command.words, env={**variables, **dict(command.variables)}, stdout=pipe, stderr=pipe, text=True
    )


def _finished(process: subprocess.Popen[str], command: Command) -> Figures:
    output, errors = process.communicate()
    found = [line for line in output.splitlines() if line.startswith('{"round_s"')]
    if process.returncode or not found:
        said = [line.strip() for line in errors.splitlines() if line.strip()]
        raise RunError(f"{command.title} failed ({process.returncode}): {said[-1] if said else 'it said nothing'}")
    figures: Figures = json.loads(found[-1])
    return figures
