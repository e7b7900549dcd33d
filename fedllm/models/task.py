"""The task: base model, adapter, scope and objective."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedllm.errors import ConfigError
from fedllm.models.adapters.base import Adapter
from fedllm.models.adapters.lora import Lora
from fedllm.models.objectives.base import Objective
from fedllm.models.objectives.sft import Sft
from fedllm.models.templates import Template
from fedllm.tensors.tree import matches


@dataclass(frozen=True)
class Phase:
    """A part of the local work.

    Args:
        train: patterns of the tensors that train in it.
        beside: of those that stand still and count in the forward pass; what is in neither does not.
    """

    train: tuple[str, ...]
    beside: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.train:
            raise ConfigError("task.scope.phases has one in which nothing trains; name tensors in its `train`")


@dataclass(frozen=True)
class Scope:
    """Which tensors of the adapter train, and which of those are shared; shell-style patterns over tensor names.

    Args:
        train: tensors that train. freeze: tensors that do not, although `train` fits them; they keep their initial
            values, which every client knows from the run's key, and are never sent.
        share: tensors that are sent and averaged; the rest stays on its client.
        alternate: patterns that take turns: round r trains and sends, of the tensors that fit one of them, those of the
            (r mod n)-th alone. The others stand where the server has them.
        hold: tensors that a client is sent and uses, but neither trains nor sends: a stage moves them on the server.
        phases: what trains one after the other in a round's local work; empty: all at once. Each phase runs the whole
            plan of the work.
    """

    train: tuple[str, ...] = ("*",)
    share: tuple[str, ...] = ("*",)
    freeze: tuple[str, ...] = ()
    alternate: tuple[str, ...] = ()
    hold: tuple[str, ...] = ()
    phases: tuple[Phase, ...] = ()

    def __post_init__(self) -> None:
        if len(self.alternate) == 1:
            raise ConfigError("task.scope.alternate holds one pattern; give two or more, which take turns")

    def trains(self, name: str) -> bool:
        """True if the tensor trains."""
        return matches(name, self.train) and not matches(name, self.freeze)

    def shares(self, name: str) -> bool:
        """True if the tensor is sent."""
        return matches(name, self.share)

    def trains_in_round(self, name: str, round: int) -> bool:
        """True if the tensor trains in this round."""
        if matches(name, self.hold):
            return False
        if not self.alternate or not matches(name, self.alternate):
            return True
        return matches(name, [self.alternate[round % len(self.alternate)]])


@dataclass(frozen=True)
class Task:
    """What is learned.

    Args:
        model: packaged alias, hub id, folder, or path of a GGUF file.
        template: `chat` (the tokenizer's own), `alpaca`, or `plain`.
        device, dtype: of the base model; `auto` takes the GPU if there is one, and bfloat16 where it is fast.
        quantize: keep the base model's matrices in 8 or 4 bits, and compute with them in `dtype`.
    """

    model: str
    adapter: Adapter = Lora()
    objective: Objective = Sft()
    scope: Scope = Scope()
    template: Template = "chat"
    device: str = "auto"
    dtype: Literal["auto", "float32", "float64", "bfloat16", "float16"] = "auto"
    quantize: Literal["int8", "int4"] | None = None
