"""How much memory a stack of clients takes, and how many stacks may run at once.

    stack = copies x parameters x clients + slack x saved(T, sum of L^2) + head
    T: tokens that are computed, L: lengths of sequences, of its largest batch

What a pass saves for its gradient is measured once on a short row: c0 + c1 T + c2 sum L^2, with and without
recomputation. `head`: the logits of one chunk.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from fedllm.engines.process_memory import address_space, free_memory, held_memory, mapped_memory
from fedllm.errors import ConfigError
from fedllm.models.batch import Example, collate, spared
from fedllm.models.kernels import prepack
from fedllm.models.kernels.ops import supports_product
from fedllm.models.layers.attention import SHORT
from fedllm.models.layers.cross_entropy import pieces
from fedllm.models.loaded_model import LoadedModel
from fedllm.tensors.tree import Tree, num_bytes, stack
from fedllm.training.base import ClientJob, Work, batches

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
COPIES = 9.0  # of a client's parameters: message, request, start, values, gradients (2), moments (2), reply
SLACK = 1.2  # a heap has holes
PRODUCTS = 70 << 20  # what the libraries keep of how they multiply matrices of past shapes
USABLE = 0.8  # of the memory that is free
LAID_OUT = 0.25  # of the budget, at most: laid-out weights


def parse_bytes(text: str) -> int:
    """ "2GB", "512 MiB", "1000000".

    Raises:
        ConfigError: it is no amount.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in UNITS:
        raise ConfigError(f"engine.batched.memory_budget is {text!r}; write an amount such as 2GB or 512MiB")
    return int(float(match[1]) * UNITS[match[2].upper()])


@dataclass(frozen=True)
class SavedActivations:
    """Bytes that a pass keeps for its gradient: base + token T + square sum L^2 + sequence S."""

    base: float
    token: float
    square: float
    sequence: float

    def of(self, lengths: Sequence[int], less: int = 0) -> float:
        """Bytes for sequences of these lengths, `less` of whose tokens are not computed."""
        squares = sum(length**2 for length in lengths if length <= SHORT)
        return self.base + self.token * (sum(lengths) - less) + self.square * squares + self.sequence * len(lengths)


@dataclass(frozen=True)
class MemoryEstimate:
    """What a stack takes. `whole` and `recomputed`: without and with recomputation; `layer`: the share of one layer,
    which recomputation holds at a time; `head`: bytes of one row's logits in the head's type and in float32; `rows`:
    how many of each exist at once; `shares`: as the model says."""

    whole: SavedActivations
    recomputed: SavedActivations
    layers: int
    head: tuple[int, int]
    rows: tuple[int, int]
    shares: bool

    @staticmethod
    def measured(model: LoadedModel, params: Tree) -> MemoryEstimate:
        """Measure what a pass keeps."""
        head = model.adapter.head(stack([params])).to(model.device)  # a trained head comes with the parameters
        layers = len({name for name, _ in model.base.model.named_modules() if re.fullmatch(r".*layers\.\d+", name)})
        wide = torch.promote_types(head.dtype, torch.float32).itemsize
        return MemoryEstimate(
            whole=_fitted(model, params, recompute=False),
            recomputed=_fitted(model, params, recompute=True),
            layers=max(1, layers),
            head=(len(head) * head.element_size(), len(head) * wide),
            rows=pieces(head),
            shares=model.shares_prefixes,
        )

    def of(self, work: Work, jobs: Sequence[ClientJob], *, recompute: bool) -> int:
        """Bytes of a stack at its largest batch."""
        parameters = COPIES * sum(num_bytes(job.initial) for job in jobs)
        micro = (batch for step in batches(work, jobs) for batch in step)
        return int(parameters + max((self._batch(clients, recompute) for clients in micro), default=0))

    def _batch(self, clients: Sequence[Sequence[Example]], recompute: bool) -> float:
        examples = [example for client in clients for example in client]
        lengths = [example.needed for example in examples]
        less = sum(map(spared, clients)) if self.shares else 0
        rows = sum(int((example.targets >= 0).sum()) for example in examples)
        logits = min(rows, self.rows[0]) * self.head[0] + 2 * min(rows, self.rows[1]) * self.head[1]
        whole = self.whole.of(lengths, less)
        return logits + SLACK * (self.recomputed.of(lengths, less) + whole / self.layers if recompute else whole)


PROBES = ((32, 32), (64,), (64, 64), (16, 16, 16, 16))  # lengths of sequences


def _fitted(model: LoadedModel, params: Tree, *, recompute: bool) -> SavedActivations:
    rows = [[1, sum(p), sum(n * n for n in p), len(p)] for p in PROBES]
    found = [_kept(model, params, lengths, recompute) for lengths in PROBES]
    solved = torch.linalg.solve(torch.tensor(rows).double(), torch.tensor(found).double())
    return SavedActivations(*solved.clamp(min=0).tolist())


def _kept(model: LoadedModel, params: Tree, lengths: Sequence[int], recompute: bool) -> int:
    """Bytes of all tensors that one pass keeps, each piece of memory once, the model's and the adapter's not at all."""
    leaves = {name: leaf[None].to(model.device, copy=True).requires_grad_() for name, leaf in params.items()}
    tensors = [*model.base.model.parameters(), *model.base.model.buffers(), *leaves.values(), *model.constants.values()]
    known = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in known:
            kept[memory.data_ptr()] = memory.nbytes()
        return tensor

    batch = collate([[_example(length) for length in lengths]], recompute=recompute)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model.losses(leaves, batch)
    total = sum(kept.values())
    del loss
    return total


def _example(length: int) -> Example:
    targets = torch.full((length,), -100)
    targets[-1] = 1
    return Example(torch.arange(1, length + 1), targets)


def layout_bytes(model: LoadedModel, budget: int) -> int:
    """What the frozen weights take that are laid out beforehand; 0 if they are not: there is no kernel that reads them
    so, or they would take more than their share of the budget."""
    linears = [module for module in model.base.model.modules() if type(module) is nn.Linear]
    weights = {id(linear.weight): linear.weight for linear in linears if supports_product(linear.weight)}
    count = prepack.num_bytes(weights.values())
    return count if count <= LAID_OUT * budget else 0


def free_bytes(device: str) -> int:
    """Memory that this process may still take, on the device where it computes."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    bounds = [free_memory()]
    limit = address_space()
    if limit is not None:
        bounds.append(limit - mapped_memory())
    group = Path("/sys/fs/cgroup")
    if (group / "memory.max").is_file() and (most := (group / "memory.max").read_text().strip()) != "max":
        bounds.append(int(most) - int((group / "memory.current").read_text()))
    return max(0, min(bounds))


def taken_bytes(device: str) -> tuple[int, int]:
    """Memory that this process takes on the device where it computes: now, and at most so far."""
    if device.startswith("cuda"):
        return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    return held_memory()


@dataclass(eq=False)
class MemoryBudget:
    """Lets stacks run at once as long as their bytes fit the budget; a stack alone always may. First come, first
    served. `peak`: the most bytes that ran at once."""

    budget: int
    used: int = 0
    peak: int = 0
    _waiting: list[object] = field(default_factory=list)
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def _fits(self, need: int) -> bool:
        return not self.used or self.used + need <= self.budget

    @contextmanager
    def room(self, need: int) -> Iterator[None]:
        """Wait for `need` bytes, and give them back at the end."""
        me = object()
        with self._changed:
            self._waiting.append(me)
            self._changed.wait_for(lambda: self._waiting[0] is me and self._fits(need))
            self._waiting.pop(0)
            self.used += need
            self.peak = max(self.peak, self.used)
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self.used -= need
                self._changed.notify_all()
