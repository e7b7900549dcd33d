"""Export: a run's model for other tools."""

from __future__ import annotations

from pathlib import Path

import torch

from fedllm.errors import ConfigError, nearest
from fedllm.finished import Opened
from fedllm.outputs import save_adapter
from fedllm.state import atomic_folder
from fedllm.tasks.base import load_base

FORMS = ("peft", "merged")


def export(run: Opened, to: str, out: Path) -> Path:
    """`peft`: the adapter in PEFT's layout. `merged`: a model folder in float32 that transformers loads.

    Raises:
        ConfigError: unknown form, or an adapter that has no such form.
    """
    if to not in FORMS:
        raise ConfigError(f"there is no export '{to}'{nearest(to, FORMS)}")
    if to == "peft":
        save_adapter(run.model, run.params, out)
        return out
    merged = run.model.adapter.merged(run.params)
    task = run.experiment.task
    base = load_base(task.model, dtype="float32", device="cpu")
    with torch.no_grad():
        for name, weight in merged.items():
            base.model.get_parameter(name).copy_(weight)
    with atomic_folder(out) as part:
        base.model.save_pretrained(part)
        base.tokenizer.save_pretrained(part)
    return out
