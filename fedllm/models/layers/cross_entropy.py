"""Cross entropy of target tokens through the output head, chunk by chunk: the logits of all rows never exist at once.

    nll_i = logsumexp(W h_i) - (W h_i)[y_i]          d nll_i / d h_i = W^T (softmax(W h_i) - onehot(y_i))

With a soft cap c the logits are z' = c tanh(z / c) of z = W h, and the gradient gets a factor 1 - (z' / c)^2 (Gemma 2).
With a frozen head the gradient of the hidden state is made in the same pass as the loss; with a trained head the
chunks are computed again in the backward pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fedllm.models.kernels import matmul, ops, prepack
from fedllm.models.kernels.matmul import MatrixLayout
from fedllm.models.layers.quantized_linear import Quantized

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK = 256  # rows whose logits exist at once: a product with the head is fast from about here
KEPT = 32 << 20  # bytes of logits on a CPU: malloc maps larger blocks anew each time, and each page costs a fault
LEAST = 32  # rows, however large the vocabulary
FEW = 4  # rows: from here on a product over the vocabulary is added up in blocks
PART = 16  # rows whose probabilities exist at once, in float32: they stay in a CPU's cache
WIDE = 1 << 27  # logits that exist at once on a GPU, which small pieces leave idle


Head = Tensor | Quantized


def row_losses(hidden: Tensor, head: Head, targets: Tensor, cap: float | None = None) -> Tensor:
    """(N, d) hidden states, (V, d) head, (N,) targets to (N,) negative log-likelihoods in nats, float32 or wider."""
    losses: Tensor = _RowLosses.apply(hidden, head, targets, cap)  # type: ignore[no-untyped-call]
    return losses


def pieces(head: Head) -> tuple[int, int]:
    """Rows whose logits exist at once, and rows whose float32 probabilities do."""
    if not head.is_cuda:
        return max(LEAST, min(CHUNK, KEPT // (len(head) * head.element_size()))), PART
    rows = max(CHUNK, WIDE // len(head))
    return rows, rows


def softcap(model: PreTrainedModel) -> float | None:
    """The bound c of a model's logits, if it has one."""
    cap: float | None = vars(model.config.get_text_config()).get("final_logit_softcapping")
    return cap


def capped(logits: Tensor, cap: float | None) -> Tensor:
    """c tanh(z / c)."""
    return logits if cap is None else (logits / cap).tanh() * cap


class _RowLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Head, targets: Tensor, cap: float | None) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        losses = torch.empty(len(targets), dtype=wide, device=hidden.device)
        needs_hidden, needs_head, *_ = ctx.needs_input_grad
        gradient = torch.empty_like(hidden) if needs_hidden and not needs_head else None
        for rows in _cut(len(targets), pieces(head)[0]):
            logits = logits_of(hidden[rows], head)
            if gradient is not None and cap is None and logits.element_size() == 2 and _by_kernel(head, logits):
                losses[rows], gradient[rows] = _with_gradient(logits, targets[rows], head)
                continue
            losses[rows] = _differentiated(logits, targets[rows], wide, cap, pieces(head)[1])
            if gradient is not None:
                gradient[rows] = _times_head(logits, head)
        ctx.one_pass, ctx.cap = gradient is not None, cap
        if gradient is not None:
            ctx.save_for_backward(gradient)
        elif isinstance(head, Tensor):
            ctx.save_for_backward(hidden, head, targets)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        if ctx.one_pass:
            (gradient,) = ctx.saved_tensors
            return (gradient * grad[:, None]).to(gradient.dtype), None, None, None
        hidden, head, targets = ctx.saved_tensors
        # the sum over all rows is kept wide, as one product would keep it
        d_hidden, d_head = torch.empty_like(hidden), torch.zeros_like(head, dtype=grad.dtype)
        for rows in _cut(len(targets), pieces(head)[0]):
            gradient = hidden[rows] @ head.T
            _differentiated(gradient, targets[rows], grad.dtype, ctx.cap, pieces(head)[1])
            gradient.mul_(grad[rows, None])
            d_hidden[rows] = _times_head(gradient, head)
            d_head += gradient.T @ hidden[rows]
        return d_hidden, d_head.to(head.dtype), None, None


def _by_kernel(head: Head, rows: Tensor) -> TypeGuard[Tensor]:
    return isinstance(head, Tensor) and ops.supports(rows) and ops.supports_product(head)


def _with_gradient(logits: Tensor, targets: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) losses and their gradients (N, d).

    Most words of a vocabulary have next to no probability, and to multiply the others alone takes a third of the time:

        W^T p = sum of p_v W_v over the others + (sum of p_v over those) (mean of all W_v)

    That is off by less than what p is by being rounded to 16 bits. A row's bits do not depend on other rows. To leave
    small gradients out is the gradient filtering of "Cut Your Losses in Large-Vocabulary Language Models" (2411.09009).
    """
    losses, rest = ops.cross_entropy_few_(logits, targets)
    plus = torch.outer(rest.to(logits.dtype), prepack.mean(head))
    return losses, matmul.product(logits, prepack.matrix(head, MatrixLayout.PLAIN), plus=plus, few=True)


def _differentiated(logits: Tensor, targets: Tensor, wide: torch.dtype, cap: float | None, part_rows: int) -> Tensor:
    """(N,) losses of (N, V) logits, which become softmax - onehot, times the cap's gradient, in their own memory."""
    if cap is None and ops.supports(logits):
        return ops.cross_entropy_(logits, targets)
    losses = torch.empty(len(targets), dtype=wide, device=logits.device)
    for rows in _cut(len(targets), part_rows):
        part = logits[rows] if cap is None else capped(logits[rows].to(wide), cap)
        picked, probabilities = targets[rows, None], part.softmax(1, dtype=wide)
        # logsumexp = largest logit - log(its probability), which is never below 1 / V
        logsum = part.amax(1).to(wide) - probabilities.amax(1).log()
        losses[rows] = logsum - part.gather(1, picked)[:, 0]
        gradient = probabilities.scatter_add_(1, picked, probabilities.new_full(picked.shape, -1))
        logits[rows] = gradient if cap is None else gradient.mul_(1 - (part / cap).square())
    return losses


def logits_of(hidden: Tensor, head: Head) -> Tensor:
    """(N, d) and (V, d) to (N, V); no gradient goes through it."""
    if _by_kernel(head, hidden):
        return matmul.product(hidden, prepack.matrix(head, MatrixLayout.TURNED))
    return hidden @ head.T if isinstance(head, Tensor) else head.forward(hidden)


def _times_head(gradient: Tensor, head: Head) -> Tensor:
    """(N, V) times (V, d), in at least FEW rows: below, a CPU adds up the vocabulary in one running sum, whose rounding
    in float32 is 1e-4 of a gradient in place of 1e-5."""
    if _by_kernel(head, gradient):
        return matmul.product(gradient, prepack.matrix(head, MatrixLayout.PLAIN))
    rows = len(gradient)
    padded = gradient if rows >= FEW else torch.cat([gradient, gradient.new_zeros(FEW - rows, gradient.shape[1])])
    return (padded @ head if isinstance(head, Tensor) else head.backward(padded))[:rows]


def _cut(count: int, size: int) -> list[slice]:
    """Pieces of at most `size` whose lengths differ by one at most: for a few rows the whole head is read, too."""
    pieces = -(-count // size)
    return [slice(count * at // pieces, count * (at + 1) // pieces) for at in range(pieces)]
