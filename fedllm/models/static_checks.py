"""What can be decided of a task before its model is loaded."""

from __future__ import annotations

from pathlib import Path

from fedllm.errors import config_name
from fedllm.models.adapters.lora import Lora
from fedllm.models.adapters.multi_lora import MultiLora
from fedllm.models.adapters.peft import Peft
from fedllm.models.adapters.peft_format import adapter_file
from fedllm.models.adapters.targets import targeted
from fedllm.models.base_models.huggingface import require_model
from fedllm.models.base_models.load import ALIASES, place_of, resolve_device
from fedllm.models.base_models.meta_device import meta_model
from fedllm.models.task import Task


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
    if isinstance(adapter, Lora | MultiLora):
        if isinstance(adapter, Lora) and adapter.init_from is not None:
            adapter_file(Path(adapter.init_from))
        model = meta_model(task.model)
        if model is not None:
            targeted(model, adapter.targets, adapter.rank, f"task.adapter.{config_name(adapter)}")
