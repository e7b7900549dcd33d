"""The loop that a careful user writes by hand: PyTorch, transformers, and nothing of fedllm.

LoRA layers around the frozen linears, right-padded batches, logits of the labelled rows only, fused AdamW.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class BareLora(nn.Module):
    """y = W x + (alpha / rank) B A x."""

    def __init__(self, layer: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.layer, self.scale = layer, alpha / rank
        bound = layer.in_features**-0.5
        self.a = nn.Parameter(torch.empty(rank, layer.in_features).uniform_(-bound, bound))
        self.b = nn.Parameter(torch.zeros(layer.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, in) to (B, L, out)."""
        low = x @ self.a.to(x.dtype).T
        return self.layer(x) + self.scale * (low @ self.b.to(x.dtype).T)


class BareLoop:
    """A model folder, a LoRA on every linear layer but the head, and AdamW."""

    def __init__(self, folder: str, *, rank: int, alpha: float, lr: float, dtype: torch.dtype) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
        self.model.requires_grad_(False).eval()
        self.rank, self.alpha, self.lr = rank, alpha, lr
        head = self.model.get_output_embeddings()
        linears = [(n, m) for n, m in self.model.named_modules() if isinstance(m, nn.Linear) and m is not head]
        for name, layer in linears:
            parent, _, child = name.rpartition(".")
            setattr(self.model.get_submodule(parent), child, BareLora(layer, rank, alpha))
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=lr, weight_decay=0.0, fused=True)

    def step(self, batch: Sequence[tuple[Tensor, Tensor]]) -> float:
        """One step on (tokens, targets) pairs; targets are -100 where there is no label."""
        width = max(len(tokens) for tokens, _ in batch)
        ids = torch.stack([nn.functional.pad(tokens, (0, width - len(tokens))) for tokens, _ in batch])
        targets = torch.stack([nn.functional.pad(labels, (0, width - len(labels)), value=-100) for _, labels in batch])
        mask = torch.stack([torch.arange(width) < len(tokens) for tokens, _ in batch])
        hidden = self.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        rows = targets != -100
        logits = self.model.get_output_embeddings()(hidden[rows]).float()
        losses = nn.functional.cross_entropy(logits, targets[rows], reduction="none")
        owners = rows.nonzero()[:, 0]
        counts = torch.bincount(owners, minlength=len(batch))
        loss = (losses / counts[owners]).sum() / len(batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())
