"""Clients in Ray's processes, for simulations that outgrow one process or machine.

    driver    request -> serialize -> bytes -->  actor    Site.answers: a stack of clients over its own base model
              deserialize <- bytes <-----------           a lost actor is replaced, and its stacks are asked again

What crosses is text (the experiment as `config_file.dump` writes it, which an actor builds anew), bytes of
`messages/serialization.py`, and their numbers: no object of fedllm's. Ray itself pickles the calls of its own
processes, these plain values and the name of the actor's class included, and whoever can reach a Ray cluster can run
code on it. It is for machines of one owner, not for parties that do not trust each other.

All calls to a client in a round reach the same actor, where its session is. Its memories are files in the run's folder,
which all nodes must share; they have versions, so that a client that is asked again answers with the same bits.
"""

from __future__ import annotations

import logging
import os
import socket
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fedllm.engines.base import Engine
from fedllm.engines.remote.dispatcher import Answer, Dispatcher
from fedllm.engines.torch_threads import one_thread
from fedllm.errors import ConfigError, MissingExtra, RunError
from fedllm.events import Emit
from fedllm.experiment.record import Experiment
from fedllm.messages.call import Call


@dataclass(frozen=True)
class Ray(Engine):
    """The Ray engine.

    Args:
        stack: clients a stack. 1 gives the serial engine's bits; more, the same within rounding.
        actors: default one a core, or as many as the GPUs hold.
        gpus_per_actor: may be a fraction. Default 1 where Ray sees GPUs and the task may use them, else 0.
        address: of a running cluster, or "auto". Default a Ray of this machine, from the run's start to its end. A Ray
            that this process has started before is used as it is, and left running.
    """

    stack: int = 1
    actors: int | None = None
    gpus_per_actor: float | None = None
    address: str | None = None

    def __post_init__(self) -> None:
        for name in ("stack", "actors"):
            value = self.__dict__[name]
            if value is not None and value < 1:
                raise ConfigError(f"engine.ray.{name} is {value}; it must be 1 or more")
        if self.gpus_per_actor is not None and self.gpus_per_actor < 0:
            raise ConfigError(f"engine.ray.gpus_per_actor is {self.gpus_per_actor}; it must be 0 or more")

    @property
    def stacks(self) -> bool:
        """Only then must the clients be stackable."""
        return self.stack > 1

    @contextmanager
    def open(self, experiment: Experiment, folder: Path | None, emit: Emit) -> Iterator[Call]:
        """Connect, start the actors, let each load the task; answer calls until closed.

        Raises:
            MissingExtra: Ray is not installed.
            ConfigError: the experiment is not one that a file can hold, or there is no room for the actors.
            RunError: Ray cannot be reached, or an actor cannot start.
        """
        _text(experiment)  # before anything starts
        device = experiment.task.device
        with one_thread(), self.started(device) as actors, actors.serving(experiment, folder, self.stack, emit) as call:
            yield call

    @contextmanager
    def started(self, device: str = "auto") -> Iterator[RayActors]:
        """The actors, until closed, for tasks on a device. They may serve several experiments, one after another."""
        ray = _imported()
        with self._connected(ray):
            actors = RayActors(ray, *self._share(ray.cluster_resources(), device))
            try:
                yield actors
            finally:
                actors.close()

    @contextmanager
    def _connected(self, ray: Any) -> Iterator[None]:
        if ray.is_initialized():
            yield
            return
        local = {"num_cpus": max(os.cpu_count() or 1, self.actors or 1), "include_dashboard": False}
        place = {"address": "local", **local} if self.address is None else {"address": self.address}
        try:
            _knock(self.address)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about settings of its own
                ray.init(log_to_driver=False, logging_level=logging.ERROR, **place)
        except Exception as error:  # one that does not start in time has no type of its own
            raise RunError(self._absent(error)) from error
        try:
            yield
        finally:
            ray.shutdown()

    def _absent(self, error: Exception) -> str:
        if self.address is not None:
            return (
                f"engine.ray.address: Ray cannot be reached at {self.address} ({_brief(error)}); start it there with: "
                "ray start --head"
            )
        return (
            f"Ray could not be started on this machine ({_brief(error)}); try again when it has less to do, or use the "
            "engine serial or batched"
        )

    def _share(self, resources: Mapping[str, float], device: str) -> tuple[int, float]:
        """Actors, and the GPUs of each."""
        cores, gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
        each = self.gpus_per_actor
        if each is None:
            each = 1 if gpus and device != "cpu" else 0
        room = int(min(cores, gpus / each) if each else cores)
        if (self.actors or 1) > room:
            raise ConfigError(
                f"engine.ray.actors is {self.actors or 1}, but with {cores:g} cores and {gpus:g} GPUs, one core and "
                f"{each:g} GPUs each, Ray has room for {room}; lower engine.ray.actors or gpus_per_actor"
            )
        return self.actors or room, each


class RayActors:
    """The actors, by place."""

    def __init__(self, ray: Any, actors: int, gpus: float) -> None:
        self._ray, self._gpus = ray, gpus
        self.lost: tuple[type[Exception], ...] = (
            *(ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError),
            *(ray.exceptions.ObjectLostError, ray.exceptions.OutOfMemoryError),
        )
        self._charge: tuple[str, ...] = ()
        self.parameters = 0
        self.workers = [self._worker() for _ in range(actors)]

    @contextmanager
    def serving(self, experiment: Experiment, folder: Path | None, stack: int, emit: Emit) -> Iterator[Call]:
        """Let every actor load the task; answer calls until closed.

        Raises:
            RunError: an actor cannot.
        """
        with TemporaryDirectory() as own:
            memories = (folder or Path(own)).absolute()
            memories.mkdir(parents=True, exist_ok=True)  # an actor that does not see it does not share the disk
            self._charge = (_text(experiment), os.getcwd(), str(memories))
            try:
                begun = self._ray.get([worker.initialize.remote(*self._charge) for worker in self.workers])
            except self.lost as error:
                raise RunError(
                    f"a Ray actor was lost before it had loaded {experiment.task.model} ({_brief(error)})"
                ) from None
            for found in begun:
                if isinstance(found, str):
                    raise RunError(found)
            self.parameters = begun[0]
            yield Dispatcher(self, stack, bool(experiment.aggregator.handlers()), emit)

    def ask(self, place: int, name: str, sent: Sequence[bytes]) -> Any:
        """Ray's reference to an answer to come. An actor answers in the order in which it is asked."""
        return self.workers[place].answers.remote(name, list(sent))

    def answer(self, reference: Any) -> Answer:
        """Wait for it. Raises one of `lost` if the actor was."""
        found: Answer = self._ray.get(reference)
        return found

    def replace(self, place: int) -> None:
        """A new actor, which begins where the old one did. The old one, should it live, is ended first."""
        self._ray.kill(self.workers[place])
        self.workers[place] = self._worker()
        self.workers[place].initialize.remote(*self._charge)  # its trouble is its answer to what follows

    def close(self) -> None:
        """End the processes."""
        for worker in self.workers:
            self._ray.kill(worker)

    def _worker(self) -> Any:
        return self._kind.options(num_cpus=1, num_gpus=self._gpus).remote()

    @cached_property
    def _kind(self) -> Any:
        from fedllm.engines.remote.worker import RemoteWorker  # reads the catalog, which names this engine

        return self._ray.remote(RemoteWorker)


def _text(experiment: Experiment) -> str:
    from fedllm.engines.remote.worker import to_text

    return to_text(experiment)


def _imported() -> Any:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # read when Ray is imported and by the processes that it starts
    try:
        import ray
    except ImportError as error:
        raise MissingExtra("ray", "ray") from error
    return ray


def _knock(address: str | None) -> None:
    """Raises OSError where nobody listens at host:port, for which Ray would wait for minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


def _brief(error: Exception) -> str:
    """The last line of what Ray says, where the cause stands."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:200] if lines else type(error).__name__
