"""Weights of two branches for each sequence, by how alike it is to a client's own inputs.

    w = cap * <e(x) / |e(x)|, reference>        of the last branch; 1 - w of the first

e: the last hidden state before the answer under the last branch alone; reference: the mean of e_i / |e_i| over inputs
of the client, so that w is cap times their mean cosine. FedDPA, arXiv:2403.19211.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from fedllm.models.adapters.base import Decoder
from fedllm.models.batch import Batch


@dataclass(frozen=True, eq=False)
class Similarity:
    """How likeness is measured. `cap`: the largest weight of the last branch."""

    decoder: Decoder
    cap: float

    @torch.no_grad()
    def states(self, last: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """(S, d): of each sequence, the last hidden state before its first label; of one without labels, its last.

        last: a stack for the layers, of the last branch alone.
        """
        ends = torch.tensor([*accumulate(batch.lengths)]) - 1
        for row, sequence in zip(batch.rows.tolist()[::-1], batch.row_sequences.tolist()[::-1], strict=True):
            ends[sequence] = row
        hidden = self.decoder.row(last, replace(batch, shared=(), dropout=(), rows=ends))
        return hidden[ends.to(hidden.device)].float()

    def prompts(self, last: Mapping[str, Tensor], tokens: Tensor, mask: Tensor) -> Tensor:
        """(B, d): the same of left-padded (B, L) prompts of one client."""
        lengths = tuple(int(row.sum()) for row in mask)
        rows = [row[len(row) - length :] for row, length in zip(tokens.cpu(), lengths, strict=True)]
        none = torch.zeros(0, dtype=torch.long)
        batch = Batch(
            tokens=torch.cat(rows),
            positions=torch.cat([torch.arange(length) for length in lengths]),
            lengths=lengths,
            counts=(len(lengths),),
            rows=none,
            targets=none,
            row_sequences=none,
            unseen=(0,),
        )
        return self.states(last, batch)

    def reference(self, states: Tensor) -> Tensor:
        """(d,): the mean of the directions of (S, d) states."""
        return torch.nn.functional.normalize(states, dim=1).mean(0)

    def weights(self, states: Tensor, references: Tensor) -> Tensor:
        """(S, 2): 1 - w and w of (S, d) states, each with its own reference."""
        w = self.cap * (torch.nn.functional.normalize(states, dim=1) * references.to(states)).sum(1)
        return torch.stack([1 - w, w], 1)
