"""A worker in another process: it is given the experiment as text and requests as bytes, and answers with bytes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from fedllm.engines.allocator import retain_freed_memory
from fedllm.engines.client import Site
from fedllm.engines.loopback import serve
from fedllm.engines.remote.dispatcher import Answer
from fedllm.engines.torch_threads import one_thread
from fedllm.errors import ConfigError, FedllmError
from fedllm.experiment import config_file
from fedllm.experiment.record import Experiment
from fedllm.models.layers.quantized_linear import num_parameters


class RemoteWorker:
    """A process that holds the base model and answers for its clients."""

    def __init__(self) -> None:
        self.site: Site | None = None
        self.trouble = ""

    def initialize(self, text: str, place: str, folder: str) -> int | str:
        """Build the experiment in the working directory `place`, and load its task unless it is the one at hand.

        Returns the number of the base model's parameters, or what went wrong.
        """
        held, self.site, self.trouble = self.site, None, ""
        try:
            os.chdir(place)
            if not Path(folder).is_dir():
                raise FileNotFoundError(2, "it is not there", folder)
            experiment = config_file.build(json.loads(text))
            same = held is not None and held.model.task == experiment.task
            with one_thread():
                self.site = Site.of(experiment, Path(folder), held.model if held is not None and same else None)
            return int(num_parameters(self.site.model.base.model))
        except OSError as error:
            self.trouble = (
                f"another process cannot use {error.filename} ({error.strerror}); put the run's folder and its data "
                "where all nodes see them under one path"
            )
        except FedllmError as error:
            self.trouble = f"another process cannot begin: {error}"
        return self.trouble

    def answers(self, name: str, sent: list[bytes]) -> Answer:
        """One call to a stack of clients."""
        if self.site is None:
            return self.trouble
        try:
            with one_thread(), retain_freed_memory():
                return [(reply.data, reply.parts) for reply in serve(self.site, name, sent)]
        except (torch.OutOfMemoryError, MemoryError) as error:
            reason = " ".join(str(error).split())[:200]
            return f"another process ran out of memory ({reason}); lower the engine's stack or the work's batch_size"
        except FedllmError as error:
            return str(error)


def to_text(experiment: Experiment) -> str:
    """The experiment as text that a worker builds it from.

    Raises:
        ConfigError: it has a component that is not in the catalog.
    """
    spec = config_file.dump(experiment)
    try:
        if config_file.build(spec) == experiment:
            return json.dumps(spec)
        own = "a component"
    except ConfigError:
        own = next((key for key in _keys(spec) if ":" in key), "a component")
    raise ConfigError(
        f"{own} is Python of your own, and another process builds the experiment from its text, which can only name "
        "what fedllm itself has; use the engine serial or batched"
    )


def _keys(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        yield from value
    for item in value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ():
        yield from _keys(item)
