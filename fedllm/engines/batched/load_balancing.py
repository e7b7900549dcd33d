"""Which clients of a cohort train in one stack: clients are balanced so that stacks have about as many tokens.

The last stack of a round is waited for with the other workers idle, and the tokens of stacks cut in the cohort's order
differ by a fifth. The result depends on the clients of a batch of stacks alone, not on the workers.

How many clients a full stack has depends on how short their batches are: a product of few rows is far from the
processor's peak, and a call costs as much for few tokens as for many. Larger stacks than that only cost
memory.
"""

from __future__ import annotations

from collections.abc import Sequence

BATCH_OF_STACKS = 4  # full stacks' worth of clients that are balanced together
FULL = 512  # tokens in a batch of a full stack
SIZES = (4, 16)  # clients of a full stack, at least and at most


def stack_size(tokens: float) -> int:
    """Clients of a full stack on a CPU, whose batches have so many tokens each; 0 where that is not known."""
    fewest, most = SIZES
    return min(max(fewest, int(FULL / tokens)), most) if tokens else fewest


def balance(loads: Sequence[int], size: int, fewest: int = 1) -> list[list[int]]:
    """Places in `loads`, as stacks of at most `size`, the fullest first.

    There are 1, 2, 4, ... stacks, as few as hold all and at least `fewest`: workers are as many. Longest processing
    time first: the largest load goes where there is least so far (Graham, Bounds on multiprocessing timing anomalies).
    Then two clients change places as long as that makes the fullest stack less full.
    """
    needed = max(-(-len(loads) // size), fewest)
    count = min(1 << (needed - 1).bit_length(), len(loads))
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
