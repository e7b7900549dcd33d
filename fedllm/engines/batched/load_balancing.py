"""Which clients of a cohort train in one stack: clients are balanced so that stacks have about as many tokens.

The last stack of a round is waited for with the other workers idle, and the tokens of stacks cut in the cohort's order
differ by a fifth. The result depends on the clients of a batch of stacks alone, not on who trains them when.

How many clients a full stack has depends on how short their batches are: a product of few rows is far from the
processor's peak, and a call costs as much for few tokens as for many. Larger stacks than that only cost
memory. Where full stacks are fewer than the workers, stacks are smaller; where clients are, a stack has several
threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

BATCH_OF_STACKS = 4  # that are balanced together, or as many as there are workers
FULL = 512  # tokens in a batch of a full stack
SIZES = (4, 16)  # clients of a full stack, at least and at most


def stack_size(tokens: float) -> int:
    """Clients of a full stack on a CPU, whose batches have so many tokens each; 0 where that is not known."""
    fewest, most = SIZES
    return min(max(fewest, int(FULL / tokens)), most) if tokens else fewest


@dataclass(frozen=True)
class Schedule:
    """How a cohort is divided: `size` clients a stack, at most, and stacks for `busy` workers, if it depends on them;
    see `divide`. `threads`: of each stack; None: those of workers that would have none."""

    workers: int
    size: int
    busy: int | None
    threads: int | None

    def batches(self, clients: int) -> list[tuple[int, int]]:
        """Clients and stacks of each batch of a cohort."""
        return divide(clients, self.size, self.busy)

    def threads_of(self, clients: int) -> tuple[int, int]:
        """Threads of each stack of a cohort; and how many of its stacks, the fullest, may have one more."""
        stacks = sum(count for _, count in self.batches(clients))
        if self.threads is not None or not 0 < stacks < self.workers:
            return self.threads or 1, 0
        return divmod(self.workers, stacks)


def divide(clients: int, size: int, workers: int | None) -> list[tuple[int, int]]:
    """How a cohort is cut into batches of stacks: the clients and the stacks of each, in order.

    With `workers` there are as many stacks for each worker, and as few as hold all clients, at most `size` in each; one
    a client where workers are more. Without, the division does not depend on workers: 1, 2 or 4 stacks a batch.
    """
    if workers is None:
        full = BATCH_OF_STACKS * size
        parts = [min(full, clients - at) for at in range(0, clients, full)]
        return [(part, min(1 << (-(-part // size) - 1).bit_length(), part)) for part in parts]
    stacks = min(-(-clients // (size * workers)) * workers, clients)
    together = max(BATCH_OF_STACKS // workers, 1) * workers
    edges = [*range(0, stacks, together), stacks]
    return [(clients * end // stacks - clients * at // stacks, end - at) for at, end in pairwise(edges)]


def balance(loads: Sequence[int], size: int, count: int) -> list[list[int]]:
    """Places in `loads`, as `count` stacks of at most `size`, the fullest first.

    Longest processing time first: the largest load goes where there is least so far (Graham, Bounds on multiprocessing
    timing anomalies). Then two clients change places as long as that makes the fullest stack less full.
    """
    count = min(count, len(loads))
    stacks: list[list[int]] = [[] for _ in range(count)]
    sums = [0] * count
    for place in sorted(range(len(loads)), key=lambda place: -loads[place]):
        least = min((at for at in range(count) if len(stacks[at]) < size), key=lambda at: (sums[at], len(stacks[at])))
        stacks[least].append(place)
        sums[least] += loads[place]
    while _swapped(stacks, sums, loads):
        pass
    order = sorted(range(count), key=lambda at: -sums[at])
    return [sorted(stacks[at]) for at in order]


def _swapped(stacks: list[list[int]], sums: list[int], loads: Sequence[int]) -> bool:
    """Whether a client of the fullest stack and a smaller one of another changed places, so that both are less full
    than it was: the swap that leaves the fuller of the two least full."""
    full = max(range(len(stacks)), key=sums.__getitem__, default=0)
    swaps = [
        (max(sums[full] - gain, sums[other] + gain), full_at, other, other_at, gain)
        for other in range(len(stacks))
        for full_at, mine in enumerate(stacks[full])
        for other_at, theirs in enumerate(stacks[other])
        if 0 < (gain := loads[mine] - loads[theirs]) < sums[full] - sums[other]
    ]
    if not swaps:
        return False
    _, full_at, other, other_at, gain = min(swaps)
    mine, theirs = stacks[full][full_at], stacks[other][other_at]
    stacks[full][full_at], stacks[other][other_at] = theirs, mine
    sums[full], sums[other] = sums[full] - gain, sums[other] + gain
    return True
