"""What `fedllm check` says of frozen weights that move: bytes, and the share of a step's products."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedllm.errors import config_name, counted
from fedllm.experiment.record import Experiment
from fedllm.messages.traits import Fact
from fedllm.models.adapters.lora import Lora
from fedllm.models.adapters.sparse_lora import SparseLora
from fedllm.models.adapters.targets import targeted
from fedllm.models.base_models.load import ALIASES, resolve_device, resolve_dtype
from fedllm.models.base_models.meta_device import meta_model
from fedllm.report.formatting import size
from fedllm.tensors.sparse_mask import num_values

BYTES = 4  # float32


def moving_line(experiment: Experiment, cohort: Sequence[str]) -> str | None:
    """One line; None where no stage moves the frozen weights.

    A step has 4 operations for each value of a frozen matrix and each token, forward and back, and 6 for each of the
    adapter. A second term in 16 bits takes 4 more for each value that moves.

    Raises:
        ConfigError: the adapter's targets fit no layer.
    """
    adapter, task = experiment.task.adapter, experiment.task
    moves = any(Fact.WRITABLE_BASE in stage.traits.needs for stage in experiment.pipeline)
    if not moves or not isinstance(adapter, Lora):
        return None
    ranks = [experiment.federation.profile(client).rank or adapter.rank for client in cohort]
    once = isinstance(adapter, SparseLora)
    told = "a step" if once else f"a step of rank {sum(ranks)} after each round of {counted(len(ranks), 'client')}"
    model = meta_model(task.model)
    if model is None:
        return f"{told}; its bytes are known once {task.model} is on this machine"
    layers = targeted(model, adapter.targets, adapter.rank, f"task.adapter.{config_name(adapter)}").values()
    shapes = [(layer.out_features, layer.in_features) for layer in layers]
    step = BYTES * sum(_values(adapter, shape, sum(ranks)) for shape in shapes)
    whole, trained = sum(n * m for n, m in shapes), sum(adapter.rank * (n + m) for n, m in shapes)
    frozen = sum(leaf.numel() for leaf in model.parameters() if leaf.dim() == 2)
    dtype = _dtype(experiment)
    extra = 0 if dtype in (torch.float32, torch.float64) else 4 * whole
    share = extra / (4 * frozen + 6 * trained + extra)
    down = "once" if once else f"to a client that has missed one, {size(BYTES * whole)} at most"
    return (
        f"{told}: {size(step)} down {down}; "
        f"{share:.0%} of a local step's products on a base in {str(dtype).removeprefix('torch.')}"
    )


def _values(adapter: Lora, shape: tuple[int, int], rank: int) -> int:
    """Of a layer's step: its factors and sparse values, or the layer."""
    values = rank * sum(shape)
    if isinstance(adapter, SparseLora):
        values = adapter.rank * sum(shape) + num_values(shape, adapter.density)
    return min(values, shape[0] * shape[1])


def _dtype(experiment: Experiment) -> torch.dtype:
    alias, wanted = ALIASES.get(experiment.task.model), str(experiment.task.dtype)
    wanted = alias.auto if alias is not None and wanted == "auto" else wanted
    return resolve_dtype(wanted, device=resolve_device(experiment.task.device))
