"""Export: a run's model for other tools."""

from __future__ import annotations

from pathlib import Path

import torch

from fedllm.errors import ConfigError, RunError, nearest
from fedllm.models.base_models.load import Base, load_base
from fedllm.models.base_models.tied_weights import set_weights
from fedllm.runs.artifacts import save_adapter, save_base
from fedllm.runs.loaded_run import LoadedRun, open_run

FORMS = ("peft", "merged")
PROBE = 8  # tokens for which the merged model and the run's are compared


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
    base = load_base(run.experiment.task.model, dtype="float32", device="cpu")
    set_weights(base.model, run.model.adapter.merged(run.params, base))
    _require_equal(run, base)
    save_base(base, place)
    return place


@torch.no_grad()
def _require_equal(run: LoadedRun, merged: Base) -> None:
    """Compare the next token's logits of both models: their 2-norms may differ by a thousandth, or by 15 % where the
    run computes in 16 bits. A quantised run is another model by design.

    Raises:
        ConfigError: they differ by more, so that merged weights cannot hold what the adapter does.
    """
    task, own = run.experiment.task, run.model.base.model
    if task.quantize is not None:
        return
    rows = int(own.get_input_embeddings().num_embeddings)
    tokens = (torch.arange(PROBE)[None] + rows // 2) % rows
    given = tokens.to(own.device)
    found = merged.model(tokens).logits[0, -1]
    expected = run.model.adapter.logits(run.params, given, torch.ones_like(given), None)[0][0].to(found)
    apart = float((found - expected).norm() / expected.norm())
    if apart > (0.15 if torch.finfo(own.dtype).bits == 16 else 1e-3):
        raise ConfigError(
            f"merged weights do not give what this adapter does (logits differ by {apart:.1%}); export --to peft"
        )
