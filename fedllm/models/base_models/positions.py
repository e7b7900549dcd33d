"""How long a sequence may be, where a model has a table with a row for each position (GPT-2, OPT).

Rotary embeddings and ALiBi are computed for any position, so that what a configuration says of their length is no hard
limit; a table has an end.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SPARE = 4  # rows at most that a table has beside those of the stated positions: offsets of OPT, BART, RoBERTa


def num_positions(model: PreTrainedModel) -> int | None:
    """The most tokens of one sequence; None where there is no hard limit."""
    stated = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(stated, int):
        return None
    return min((size for size in _tables(model) if abs(size - stated) <= SPARE), default=None)


def _tables(model: PreTrainedModel) -> Iterator[int]:
    """Usable rows of what may be tables of positions: embeddings of something else than words, and fixed tables."""
    words = model.get_input_embeddings()
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module is not words:
            before = getattr(module, "offset", 0) if module.padding_idx is None else module.padding_idx + 1
            yield module.num_embeddings - int(before)
        for name, fixed in module.named_buffers(recurse=False):
            if name in ("embed_positions", "pos_encoding") and fixed.dim() == 2:  # GPT-J and CodeGen; CTRL
                yield len(fixed)
