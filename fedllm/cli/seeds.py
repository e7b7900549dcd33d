"""`fedllm run --seeds`: an experiment once for each seed, and the mean and the spread of what came out.

mean     (1/n) sum_i x_i
spread   sqrt(1/(n - 1) sum_i (x_i - mean)^2), the standard deviation over the seeds; none for one seed
"""

from __future__ import annotations

import shlex
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich import box
from rich.console import Console

from fedllm.cli import tables
from fedllm.cli.run import run_file
from fedllm.errors import ConfigError, FedllmError, RunError, counted
from fedllm.experiment.config_file import find, load
from fedllm.report.formatting import NOTHING, figure, finite
from fedllm.report.run_history import COMPARED, by_model
from fedllm.runs.folder import Folder, default_folder

Summaries = Mapping[int, Mapping[str, Any]]  # by seed


def run_seeds(
    file: str, overrides: Sequence[str], seeds: str, *, engine: str, out: Path | None, resume: bool, **more: Any
) -> int:
    """Run each seed in a folder of its own, then print the table. A seed that fails does not stop the others.

    Returns:
        The exit code: 0, or 2 if a seed failed, or 1 if one failed with an unexpected error.

    Raises:
        ConfigError: the seeds cannot be read, or the experiment is wrong, before anything runs.
        RunError: a folder holds another experiment, or an unfinished run and `resume` was not asked for.
    """
    numbers = parsed(seeds)
    if any(change.partition("=")[0] == "seed" for change in overrides):
        raise ConfigError("both seed= and --seeds say which seed; leave out one of them")
    again = _line(file, overrides, seeds, engine=engine, out=out)
    folders = {seed: _folder(file, [*overrides, f"seed={seed}"], seed, out, resume, again) for seed in numbers}
    summaries: dict[int, Mapping[str, Any]] = {}
    codes = {0}
    for place, seed in enumerate(numbers, 1):
        print(f"seed {seed} ({place} of {len(numbers)}): {folders[seed]}", flush=True)
        changes = [*overrides, f"seed={seed}"]
        try:
            summaries[seed] = run_file(
                file, changes, engine=engine, out=folders[seed], resume=resume, alone=False, **more
            )
        except FedllmError as error:
            print(f"fedllm: seed {seed} failed: {' '.join(str(error).split())}", file=sys.stderr)
            codes.add(2)
        except Exception:
            traceback.print_exc()
            print(f"fedllm: seed {seed} failed with an unexpected error", file=sys.stderr)
            codes.add(1)
        except SystemExit as stopped:  # Ctrl-C: the run has said how it goes on
            print(f"and all seeds with:\n  {again}", file=sys.stderr)
            return int(stopped.code or 0)
    print_spread(summaries, numbers, Console())
    if len(summaries) > 1:
        print(f"Side by side:  {shlex.join(['fedllm', 'report', *(str(folders[seed]) for seed in summaries)])}")
    return 1 if 1 in codes else max(codes)


def parsed(seeds: str) -> list[int]:
    """0,1,2 as numbers.

    Raises:
        ConfigError: one of them is no whole number, or stands there twice.
    """
    try:
        numbers = [int(part) for part in seeds.split(",")]
    except ValueError:
        raise ConfigError(f"--seeds is '{seeds}'; it must be whole numbers with commas between, as 0,1,2") from None
    for seed in numbers:
        if numbers.count(seed) > 1:
            raise ConfigError(f"--seeds holds {seed} more than once; name each seed once")
    return numbers


def print_spread(summaries: Summaries, seeds: Sequence[int], console: Console) -> None:
    """A row for each metric, a column for each model: mean ± spread over the seeds that have the figure."""
    found = [by_model(summary.get("eval") or {}) for summary in summaries.values()]
    models = [title for title in dict.fromkeys(model for one in found for model in one)]
    metrics = dict.fromkeys(metric for one in found for scores in one.values() for metric in scores)
    lost = [str(seed) for seed in seeds if seed not in summaries]
    kept = ", ".join(map(str, summaries)) or "none"
    print(f"\nover {counted(len(summaries), 'seed')} ({kept})" + (f"; failed: {', '.join(lost)}" if lost else ""))
    if not metrics:
        print("nothing was evaluated")
        return
    rows = [
        [metric, *(_mean_and_spread([one.get(model, {}).get(metric) for one in found], len(found)) for model in models)]
        for metric in metrics
    ]
    tables.show(console, ["metric", *models], rows, numbers=True, bold={COMPARED["federated"]}, box=box.SIMPLE_HEAD)
    print("mean ± spread; the spread is the standard deviation over the seeds (n - 1)")


def _mean_and_spread(values: Sequence[float | None], wanted: int) -> str:
    there = [value for value in values if finite(value)]
    if not there:
        return NOTHING
    spread = figure(stdev(there)) if len(there) > 1 else NOTHING
    of = f" (n = {len(there)})" if len(there) < wanted else ""
    return f"{figure(fmean(there))} ± {spread}{of}"


def _folder(file: str, overrides: Sequence[str], seed: int, out: Path | None, resume: bool, again: str) -> Path:
    """Where a seed runs, if it may."""
    experiment = load(file, overrides)
    folder = default_folder(experiment, find(file).stem) if out is None else out / f"seed-{seed}"
    if Folder(folder).status(experiment) == "unfinished" and not resume:
        raise RunError(f"{folder} holds this experiment, unfinished; go on with:  {again}")
    return folder


def _line(file: str, overrides: Sequence[str], seeds: str, *, engine: str, out: Path | None) -> str:
    """The line that goes on with all seeds."""
    chosen = [] if engine == "auto" else ["--engine", engine]
    place = [] if out is None else ["--out", str(out)]
    return shlex.join(["fedllm", "run", file, *overrides, "--seeds", seeds, *chosen, *place, "--resume"])
