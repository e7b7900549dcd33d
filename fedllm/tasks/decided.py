"""What can be decided of a task before its model is loaded."""

from __future__ import annotations

from pathlib import Path

from fedllm.ranges import written
from fedllm.tasks.adapters.lora import Lora
from fedllm.tasks.adapters.peft import Peft
from fedllm.tasks.adapters.targets import targeted
from fedllm.tasks.base import ALIASES, place_of, resolve_device
from fedllm.tasks.outline import outline
from fedllm.tasks.peft_layout import adapter_file
from fedllm.tasks.pretrained import require_model
from fedllm.tasks.task import Task


def check_task(task: Task) -> None:
    """Refuse a task that could not be loaded. Nothing is downloaded, and no weights are read.

    Raises:
        FedllmError: the device, the model's place, the adapter's settings or its starting point cannot be.
    """
    resolve_device(task.device)
    place = None if task.model in ALIASES else place_of(task.model)
    if place is not None and place.is_dir():
        require_model(place)
    adapter = task.adapter
    if isinstance(adapter, Peft):
        adapter.config()
    if isinstance(adapter, Lora):
        if adapter.init_from is not None:
            adapter_file(Path(adapter.init_from))
        model = outline(task.model)
        if model is not None:
            targeted(model, adapter.targets, adapter.rank, f"task.adapter.{written(adapter)}")
