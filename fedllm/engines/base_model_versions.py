"""The clients' side of frozen weights that move: what the server has added to them so far, and the model with it.

All clients of a process share the base model, and with it what was added: a request brings what its client lacks, and
of that the process takes what is new to it. It is kept on the disk by version, so that any round can be run again.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock

from fedllm.engines.allocator import trim
from fedllm.engines.checksummed_files import RESUME, read_tree, written
from fedllm.errors import ClientError, FedllmError, not_written
from fedllm.files import write_durably
from fedllm.messages.traits import Fact
from fedllm.messages.update import Request
from fedllm.models.adapters.base import Movable
from fedllm.models.loaded_model import LoadedModel
from fedllm.stages.base import Stage
from fedllm.tensors.base_delta import BaseDelta

COPIES = 8  # of the layers' values in float32: the server's factors and sum, the site's, a message (3), moved weights


@dataclass(eq=False)
class BaseDeltaStore:
    """Base deltas by version, `base_delta-000003.safetensors`; with no folder they stay in this object.

    As many are kept as a resume may go back, `keep`.
    """

    folder: Path | None
    keep: int = 2
    held: dict[int, BaseDelta] = field(default_factory=dict)

    def load(self, oldest: int, newest: int) -> BaseDelta | None:
        """The newest that is not later than `newest` and not before `oldest`.

        Raises:
            RunError: it cannot be read.
        """
        known = [version for version in self._versions() if oldest <= version <= newest]
        if not known:
            return BaseDelta() if not oldest else None
        if self.folder is None:
            return self.held[known[-1]]
        path = self._path(known[-1])
        trees = read_tree(path, "without it the clients here cannot take part; bring it back from a copy")
        versions = {int(name.partition("/")[0].removeprefix("steps")) for name in trees}
        return BaseDelta.of(trees, sorted(versions))

    def save(self, base_delta: BaseDelta) -> None:
        """Keep a version; forget those that no resume needs.

        Raises:
            RunError: the disk is full or not writable; earlier versions are untouched.
        """
        version = base_delta.version
        if self.folder is None:
            self.held[version] = base_delta
        else:
            self._write(self._path(version), base_delta)
        old = [known for known in self._versions() if known <= version - self.keep]
        for known in old[:-1]:  # the newest of them is what the oldest checkpoint goes on from
            if self.folder is None:
                self.held.pop(known)
            else:
                self._path(known).unlink(missing_ok=True)

    def _write(self, path: Path, base_delta: BaseDelta) -> None:
        part = path.with_suffix(f".{os.getpid()}")  # processes may share the folder
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_durably(part, written(base_delta.joined_trees()))
            os.replace(part, path)
        except OSError as error:
            raise not_written(path, error, RESUME) from error

    def _versions(self) -> list[int]:
        if self.folder is None:
            return sorted(self.held)
        return sorted(int(path.stem.rpartition("-")[2]) for path in self.folder.glob("base_delta-*.safetensors"))

    def _path(self, version: int) -> Path:
        assert self.folder is not None
        return self.folder / f"base_delta-{version:06d}.safetensors"


@dataclass(eq=False)
class BaseModelVersions:
    """The model of a process at the version that its clients are asked about. All clients of a call are at one."""

    base: LoadedModel
    store: BaseDeltaStore
    moved: tuple[BaseDelta, LoadedModel] = field(init=False)
    lock: Lock = field(default_factory=Lock)

    def __post_init__(self) -> None:
        self.moved = BaseDelta(), self.base

    def model(self, request: Request) -> LoadedModel:
        """The model as the request's client has it.

        Raises:
            ClientError: what the request adds to is not here, or does not fit the model's layers.
            RunError: the disk.
        """
        sent = request.base_delta
        with self.lock:
            held, model = self.moved
            if held.version == sent.version:
                return model
            if not held.version or not sent.after <= held.version < sent.version:
                held = self._found(sent)  # a process that has just begun finds what an earlier one came to
            if held.version < sent.version:
                held = self._joined(held, sent)
                self.store.save(held)
            self.moved = held, self.base.with_base_delta(held)
            trim()  # the messages of a round and the weights before it, each as large as the layers
            return self.moved[1]

    def taken(self, request: Request) -> Request:
        """The request without what it brings, which is here from now on: several wait for their turn, and what each
        brings is as large as the layers. As it is, where that is not possible; its client will be told."""
        if not request.base_delta.steps:
            return request
        try:
            self.model(request)
        except FedllmError:
            return request
        return replace(request, base_delta=BaseDelta(after=request.base_delta.version))

    def reserve(self, stages: Sequence[Stage]) -> int:
        """Bytes that moving takes at most beside the training: what is kept here and on the server, messages on their
        way, and the moved weights."""
        model = self.base
        moves = any(Fact.WRITABLE_BASE in stage.traits.needs for stage in stages)
        if not moves or not isinstance(model.adapter, Movable):
            return 0
        return COPIES * 4 * model.adapter.num_movable

    def _found(self, sent: BaseDelta) -> BaseDelta:
        found = self.store.load(sent.after, sent.version)
        if found is None:
            raise ClientError(
                f"the server adds to version {sent.after} of the frozen weights, which is not kept here; bring the "
                "run's folder back from a copy"
            )
        return found

    def _joined(self, held: BaseDelta, sent: BaseDelta) -> BaseDelta:
        if not isinstance(self.base.adapter, Movable):
            raise ClientError("the server adds to frozen weights, but the adapter here does not move; use lora")
        self.base.adapter.fits(sent)
        return held.joined(sent)
