"""Secure sums in groups, and a rule between their means: the server learns each group's sum, and no update.

    cohort -> groups of at least g clients, drawn from the run's key     S_j = sum of group j (secure), n_j clients
    mean      sum_j S_j                                                  median    n median_j(S_j / n_j), entry by entry

The median outvotes groups with a bad client as long as more than half of them have none. Figures (counts, metrics,
weights) are added up with either rule. Median of means: Chen, Su and Xu 2017, arXiv 1705.05491. Buckets: Karimireddy,
He and Jaggi 2022, arXiv 2006.09365.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedllm.aggregators.masked_sum import MaskedSum
from fedllm.errors import RoundVoid, require
from fedllm.messages.call import Call, refuse
from fedllm.messages.traits import Fact, Traits
from fedllm.messages.update import Part, Request, Update

VALUES = "values"  # the part whose entries a rule may choose among; the digits of figures are added up
SMALLEST = 8  # clients: among fewer, a sum tells too much of each


@dataclass(frozen=True)
class Bucketed(MaskedSum):
    """Secure sums in groups, and a rule between them. A group whose sum is void is left out. What `corrupt`, `dropout`
    and `min_survivors` say holds for each group.

    Args:
        group: clients of a group, at least; one that is left over joins another. rule: mean or median.
    """

    group: int = SMALLEST
    rule: Literal["mean", "median"] = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        least = max(SMALLEST, self.min_survivors)
        require(self.group >= least, self, field="group", value=self.group, allowed=f"{least} or more")
        require(self.rule in ("mean", "median"), self, field="rule", value=self.rule, allowed="mean or median")

    @property
    def traits(self) -> Traits:  # type: ignore[override]
        """The median is one of group means, which are means of clients that weigh the same."""
        equal = Fact.EQUAL_WEIGHTS if self.rule == "median" else Fact(0)
        return Traits(needs=Fact.INTEGERS | equal, loses=Fact.ANY_RANK)

    def groups(self, clients: Sequence[str], key: torch.Generator) -> list[list[str]]:
        """As many groups of at least `group` clients as there can be; sizes differ by one at most."""
        count = max(1, len(clients) // self.group)
        order = torch.randperm(len(clients), generator=key).tolist()
        return [[clients[place] for place in sorted(order[start::count])] for start in range(count)]

    def reduce(self, call: Call, requests: Mapping[str, Request], name: str = "work") -> Update:
        """One call for the work, then five for each group.

        Raises:
            RoundVoid: no group has a sum.
        """
        ready = {client: reply for client, reply in call(name, requests) if isinstance(reply, Update)}
        if not ready:
            return Update({})
        ctx = requests[next(iter(ready))].ctx
        found, void = list[tuple[Update, int]](), ""
        for members in self.groups(list(ready), ctx.key.fold(ctx.round, "groups").generator()):
            try:
                found.append(self._summed(call, requests, {client: ready[client] for client in members}))
            except RoundVoid as error:
                void = str(error)
                for client in members:
                    refuse(call, "mask", client, f"its group of {len(members)} has no sum: {error}")
        if not found:
            raise RoundVoid(void)
        return combined(found, self.rule if name == "work" else "mean")


def combined(groups: Sequence[tuple[Update, int]], rule: str) -> Update:
    """The sums of groups, each of so many clients, as the sum of one round."""
    sums, clients = [one for one, _ in groups], torch.tensor([count for _, count in groups], dtype=torch.float64)
    parts = dict[str, Part]()
    for name, first in sums[0].parts.items():
        counts = clients if rule == "median" and name == VALUES else None
        leaves = {leaf: torch.stack([one.parts[name].tree[leaf] for one in sums]) for leaf in first.tree}
        parts[name] = Part({leaf: _one(each, counts) for leaf, each in leaves.items()}, 0.0)
    return Update(parts)


def _one(sums: Tensor, counts: Tensor | None) -> Tensor:
    """(groups, ...) to (...): their sum, or the median of their means for as many clients."""
    if counts is None:
        return sums.sum(0, dtype=torch.int64).to(sums.dtype)
    means = sums.double() / counts.view(-1, *[1] * (sums.dim() - 1))
    found: Tensor = means.quantile(0.5, dim=0) if len(sums) > 1 else means[0]  # of two groups, between both
    return torch.round(found * counts.sum()).to(sums.dtype)
