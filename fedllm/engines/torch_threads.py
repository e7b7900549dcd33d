"""Intra-op threads. One a worker, as long as there are as many stacks as workers: bits do not depend on the number of
cores, and no worker spins while another works."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """So many intra-op threads in this thread. The library of matrix products has one number for the whole process, so
    whoever computes at the same time needs the same one."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def one_thread() -> AbstractContextManager[None]:
    """One intra-op thread in this thread."""
    return torch_threads(1)
