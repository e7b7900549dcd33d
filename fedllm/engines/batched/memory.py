"""How much memory a stack of clients takes, and how many stacks may run at once.

    stack = copies x parameters x clients + slack x saved(T, sum of L^2) + head
    T: tokens that are computed, L: lengths of sequences, of its largest batch

A work that holds each example's gradient takes more copies of each client's parameters, and two for each example.

What a pass saves for its gradient, and `head`, the logits of one chunk, are figures of the model: `models/memory.py`.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fedllm.engines.process_memory import address_space, free_memory, held_memory, mapped_memory
from fedllm.errors import ConfigError
from fedllm.models.batch import Example, spared
from fedllm.models.loaded_model import LoadedModel
from fedllm.models.memory import MemoryTerms, memory_terms, prepacked_bytes
from fedllm.tensors.tree import Tree, num_bytes
from fedllm.training.base import ClientJob, Work, batches

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
COPIES = 9.0  # of a client's parameters: message, request, start, values, gradients (2), moments (2), reply
PRIVATE_COPIES = 12.0  # more of them: sums in float64 (2), integer noise (2) and the draws that make it (8)
EXAMPLE_COPIES = 2.0  # of an example's gradient: itself, and the weights that its pass reads
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
class MemoryEstimate:
    """What a stack takes. `shares`: whether tokens that sequences have in common are computed once."""

    terms: MemoryTerms
    shares: bool

    @staticmethod
    def measured(model: LoadedModel, params: Tree) -> MemoryEstimate:
        """Measure what a pass keeps."""
        return MemoryEstimate(memory_terms(model, params), model.shares_prefixes)

    def of(self, work: Work, jobs: Sequence[ClientJob], *, recompute: bool) -> int:
        """Bytes of a stack at its largest batch."""
        sizes = [num_bytes(job.initial) for job in jobs]
        copies, own = (COPIES + PRIVATE_COPIES, EXAMPLE_COPIES * max(sizes)) if work.per_example else (COPIES, 0.0)
        micro = (batch for step in batches(work, jobs) for batch in step)
        most = max((self._batch(clients, recompute, own) for clients in micro), default=0.0)
        return int(copies * sum(sizes) + most)

    def _batch(self, clients: Sequence[Sequence[Example]], recompute: bool, own: float) -> float:
        """`own`: bytes of each example beside its pass; none where examples share their client's gradient."""
        examples = [example for client in clients for example in client]
        lengths = [example.needed for example in examples]
        less, terms = sum(map(spared, clients)) if self.shares and not own else 0, self.terms
        rows = sum(int((example.targets >= 0).sum()) for example in examples)
        logits = min(rows, terms.rows[0]) * terms.head[0] + 2 * min(rows, terms.rows[1]) * terms.head[1]
        whole = terms.whole.of(lengths, less)
        kept = terms.recomputed.of(lengths, less) + whole / terms.layers if recompute else whole
        return own * len(examples) + logits + SLACK * kept


def layout_bytes(model: LoadedModel, budget: int) -> int:
    """What the frozen weights take that are laid out beforehand; 0 if they are not: there is no kernel that reads them
    so, or they would take more than their share of the budget."""
    count = prepacked_bytes(model)
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
