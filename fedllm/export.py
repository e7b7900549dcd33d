"""Export: a run's model for other tools."""

from __future__ import annotations

from pathlib import Path

import torch

from fedllm.errors import ConfigError, RunError, nearest
from fedllm.finished import open_run
from fedllm.outputs import save_adapter, save_base
from fedllm.tasks.base import load_base

FORMS = ("peft", "merged")


def export(folder: Path, to: str, *, out: Path | None = None, client: str | None = None) -> Path:
    """Write a run's model, or a client's personal one, and return where: `out`, or `RUN/export-TO`.

    `peft`: the adapter in PEFT's layout. `merged`: a model folder in float32 that transformers loads.

    Raises:
        ConfigError: unknown form, or an adapter that has no such form.
        RunError: no such run or client, or `out` holds something.
    """
    if to not in FORMS:
        raise ConfigError(f"there is no export '{to}'{nearest(to, FORMS)}")
    place = folder / (f"export-{to}" if client is None else f"export-{to}-{client}") if out is None else out
    if out is not None and out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise RunError(f"{out} is there already; choose another place with --out")
    run = open_run(folder, client=client)
    if to == "peft":
        save_adapter(run.model, run.params, place)
        return place
    merged = run.model.adapter.merged(run.params)
    base = load_base(run.experiment.task.model, dtype="float32", device="cpu")
    with torch.no_grad():
        for name, weight in merged.items():
            base.model.get_parameter(name).copy_(weight)
    save_base(base, place)
    return place
