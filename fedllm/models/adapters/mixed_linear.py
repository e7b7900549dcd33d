"""A frozen linear layer with several LoRAs whose weights depend on the input.

    y_t = W x_t + s sum_b w_b(t) B_b A_b u_t        u: x, or what dropout left of it

The factors of the branches stand side by side, as those of one LoRA. w is softmax(G x_t) of a router, or that of the
sequence in which the token stands. With neither it is the LoRA that the factors are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedllm.models.adapters.lora import Adapted
from fedllm.models.layers.base_delta_linear import frozen
from fedllm.models.layers.forward_context import Forward, current

SEQUENCES = "mixer.sequences"  # (S, branches): in a pass, the weights of each sequence


@dataclass(frozen=True, eq=False)
class Mixed(Adapted):
    """The forward pass of a frozen linear layer whose branches have weights that depend on the input."""

    def is_plain(self, now: Forward) -> bool:
        """Whether a pair of factors is all that a pass adds."""
        return f"{self.path}.router" not in now.stack and SEQUENCES not in now.stack

    def __call__(self, inputs: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        now = current()
        if f"{self.path}.lora_B" not in now.stack or self.is_plain(now):
            return super().__call__(inputs)
        x = inputs.flatten(0, -2)
        sizes = list(now.client_tokens) or [len(x)]
        u = self._dropped(x, now, sizes) if self.dropout and now.dropout else x
        y = frozen(self.layer, self.path, now.stack).forward(x)
        a, b = (now.stack[f"{self.path}.lora_{side}"].to(x.dtype) for side in "AB")
        weights = self._weights(x, now, sizes).to(x.dtype)  # (T, branches)
        rank = a.shape[1] // weights.shape[1]
        gates = weights.repeat_interleave(rank, 1) * self.scale
        rows = zip(u.split(sizes), gates.split(sizes), strict=True)
        added = [((u_k @ a[k].T) * gate) @ b[k].T for k, (u_k, gate) in enumerate(rows)]
        return (y + torch.cat(added)).view(*inputs.shape[:-1], -1)

    def _weights(self, x: Tensor, now: Forward, sizes: Sequence[int]) -> Tensor:
        """(T, branches)."""
        router = now.stack.get(f"{self.path}.router")
        if router is not None:
            logits = [x_k.to(router.dtype) @ router[k].T for k, x_k in enumerate(x.split(list(sizes)))]
            return torch.softmax(torch.cat(logits), 1)
        each = now.stack[SEQUENCES]  # (S, branches)
        lengths = now.lengths or (len(x) // len(each),) * len(each)
        return each.repeat_interleave(torch.tensor(lengths, device=each.device), 0)
