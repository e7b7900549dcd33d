"""The task: base model, adapter, scope and objective."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedllm.tasks.adapter import Adapter
from fedllm.tasks.adapters.lora import Lora
from fedllm.tasks.objectives import Objective, Sft
from fedllm.tasks.template import Template
from fedllm.tree import matches


@dataclass(frozen=True)
class Scope:
    """Which leaves of the adapter train, and which of those are shared; shell-style patterns over leaf names.

    Args:
        train: leaves that train. freeze: leaves that do not, although `train` fits them; they keep their initial
            values, which every client knows from the run's key, and are never sent.
        share: leaves that are sent and averaged; the rest stays on its client.
    """

    train: tuple[str, ...] = ("*",)
    share: tuple[str, ...] = ("*",)
    freeze: tuple[str, ...] = ()

    def trains(self, name: str) -> bool:
        """True if the leaf trains."""
        return matches(name, self.train) and not matches(name, self.freeze)

    def shares(self, name: str) -> bool:
        """True if the leaf is sent."""
        return matches(name, self.share)


@dataclass(frozen=True)
class Task:
    """What is learned.

    Args:
        model: packaged alias, hub id, folder, or path of a GGUF file.
        template: `chat` (the tokenizer's own), `alpaca`, or `plain`.
        device, dtype: of the base model; `auto` takes the GPU if there is one, and bfloat16 where it is fast.
    """

    model: str
    adapter: Adapter = Lora()
    objective: Objective = Sft()
    scope: Scope = Scope()
    template: Template = "chat"
    device: str = "auto"
    dtype: Literal["auto", "float32", "float64", "bfloat16", "float16"] = "auto"
