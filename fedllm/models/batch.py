"""Encoded examples, and batches of them for a stack of K clients: one row of tokens, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor

IGNORE = -100
FEWEST = 8  # tokens in common that are worth it


@dataclass(frozen=True, eq=False)
class Example:
    """One encoded record. `targets[t]` is the token that position t is to predict, or IGNORE; both (L,) int64.

    `cut` counts the tokens that were cut off to fit the largest length.
    """

    tokens: Tensor
    targets: Tensor
    cut: int = 0

    @cached_property
    def needed(self) -> int:
        """How many of its first tokens a causal model must see for its labels; all of them without any.

        The last token of a text is predicted and predicts nothing.
        """
        labelled = (self.targets != IGNORE).nonzero()
        return int(labelled[-1]) + 1 if len(labelled) else len(self.tokens)


@dataclass(frozen=True, eq=False)
class Batch:
    """The sequences of K clients side by side, client by client.

    Shapes: `tokens`, `positions` (T,); `rows` (N,) indices into T of the labelled positions, `targets` (N,),
    `row_sequences` (N,) the sequence of each; `lengths` one per sequence; `counts` sequences per client (K).
    `shared`, one per sequence: how many tokens it begins with that the first sequence of its client has, too, and that
    need not be computed again; empty where that is not asked for or there are none.
    `unseen`, one per client: tokens behind the last label of its sequences, which are in no shape above.
    `dropout` holds one generator per client while it trains and is empty in evaluation. `recompute` saves memory: the
    backward pass computes the layers again.
    """

    tokens: Tensor
    positions: Tensor
    lengths: tuple[int, ...]
    counts: tuple[int, ...]
    rows: Tensor
    targets: Tensor
    row_sequences: Tensor
    unseen: tuple[int, ...]
    shared: tuple[int, ...] = ()
    dropout: tuple[torch.Generator, ...] = field(default=())
    recompute: bool = False

    @property
    def sequence_clients(self) -> Tensor:
        """(S,): the client of each sequence."""
        return torch.repeat_interleave(torch.arange(len(self.counts)), torch.tensor(self.counts))

    @property
    def apart(self) -> Batch:
        """The same sequences, each as a client of its own that computes all of its tokens."""
        each = len(self.lengths)
        dropout = tuple(self.dropout[k] for k in self.sequence_clients) if self.dropout else ()
        return replace(self, counts=(1,) * each, unseen=(0,) * each, shared=(), dropout=dropout)

    @property
    def client_tokens(self) -> tuple[int, ...]:
        """Tokens of each client's examples (K)."""
        return tuple(seen + unseen for seen, unseen in zip(self._client_row, self.unseen, strict=True))

    @property
    def client_computed(self) -> tuple[int, ...]:
        """Tokens of each client that are computed (K): those of the row, but those in common once."""
        edges = [0, *accumulate(self.counts)]
        spared = [sum(self.shared[start:stop]) for start, stop in pairwise(edges)]
        return tuple(tokens - less for tokens, less in zip(self._client_row, spared, strict=True))

    @property
    def _client_row(self) -> tuple[int, ...]:
        """Tokens of each client in the row (K)."""
        ends = [0, *accumulate(self.lengths)]
        edges = [0, *accumulate(self.counts)]
        return tuple(ends[stop] - ends[start] for start, stop in pairwise(edges))

    def only(self, k: int) -> Batch:
        """Client k's part, as a stack of one."""
        edges, sequences = [0, *accumulate(self._client_row)], [0, *accumulate(self.counts)]
        tokens, own = slice(edges[k], edges[k + 1]), slice(sequences[k], sequences[k + 1])
        mine = (self.rows >= tokens.start) & (self.rows < tokens.stop)
        return Batch(
            tokens=self.tokens[tokens],
            positions=self.positions[tokens],
            lengths=self.lengths[own],
            counts=(self.counts[k],),
            rows=self.rows[mine] - tokens.start,
            targets=self.targets[mine],
            row_sequences=self.row_sequences[mine] - own.start,
            unseen=self.unseen[k : k + 1],
            shared=self.shared[own],
            dropout=self.dropout[k : k + 1],
            recompute=self.recompute,
        )


def in_common(examples: Sequence[Example]) -> int:
    """How many tokens without a label one client's sequences all begin with; 0 where they are fewer than FEWEST."""
    if len(examples) < 2:
        return 0
    size = min(len(example.tokens) for example in examples)
    tokens, targets = (torch.stack([vars(e)[name][:size] for e in examples]) for name in ("tokens", "targets"))
    found = int(((tokens == tokens[0]) & (targets == IGNORE)).all(0).long().cumprod(0).sum())
    return found if found >= FEWEST else 0


def spared(examples: Sequence[Example]) -> int:
    """Tokens of one client's batch that need not be computed again."""
    return in_common(examples) * (len(examples) - 1)


def collate(
    clients: Sequence[Sequence[Example]],
    dropout: tuple[torch.Generator, ...] = (),
    *,
    recompute: bool = False,
    share: bool = False,
) -> Batch:
    """Examples of K clients to one batch. A client without examples is idle in this step.

    Tokens behind an example's last label are left out: causal attention shows them to nobody whose state is needed.
    `share`: compute what a client's sequences begin with in common once. Causal attention gives it the same values in
    each of them.
    """
    examples = [example for client in clients for example in client]
    lengths = tuple(example.needed for example in examples)
    targets = torch.cat([example.targets[: example.needed] for example in examples])
    rows = (targets != IGNORE).nonzero().reshape(-1)
    sequences = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    common = [in_common(client) if share else 0 for client in clients]
    shared = tuple(c if place else 0 for c, client in zip(common, clients, strict=True) for place in range(len(client)))
    return Batch(
        tokens=torch.cat([example.tokens[: example.needed] for example in examples]),
        positions=torch.cat([torch.arange(length) for length in lengths]),
        lengths=lengths,
        counts=tuple(len(client) for client in clients),
        rows=rows,
        targets=targets[rows],
        row_sequences=sequences[rows],
        unseen=tuple(sum(len(example.tokens) - example.needed for example in client) for client in clients),
        shared=shared if any(shared) else (),
        dropout=dropout,
        recompute=recompute,
    )


def client_means(row_losses: Tensor, batch: Batch) -> Tensor:
    """(N,) losses of labelled rows to (K,): the mean over a client's examples of the mean over an example's rows.

    Each example counts the same whatever its length, so examples do not couple; one without a labelled row counts
    as 0. An idle client has 0.
    """
    owners = batch.sequence_clients
    per_sequence = torch.bincount(batch.row_sequences, minlength=len(batch.lengths)).clamp(min=1)
    per_client = torch.tensor(batch.counts).clamp(min=1)
    weights = 1.0 / (per_sequence[batch.row_sequences] * per_client[owners[batch.row_sequences]]).double()
    weights = weights.to(device=row_losses.device, dtype=row_losses.dtype)
    means = torch.zeros(len(batch.counts), dtype=row_losses.dtype, device=row_losses.device)
    return means.index_add(0, owners[batch.row_sequences].to(row_losses.device), row_losses * weights)
