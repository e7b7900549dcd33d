"""Adapters: which tensors train, where they enter the forward pass, and how they are saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedllm.models.base_models.load import Base
from fedllm.models.batch import Batch, Example
from fedllm.models.layers.cross_entropy import Head
from fedllm.models.layers.forward_context import Forward, forward_context
from fedllm.models.layers.model_probe import past_key_values
from fedllm.models.layers.quantized_linear import QuantizedLinear
from fedllm.models.layers.shared_prefix import shared_prefix
from fedllm.rng import Key
from fedllm.tensors.base_delta import BaseDelta
from fedllm.tensors.tree import Tree


class Attached(Protocol):
    """An adapter on a loaded base model. Tensors of a stack are (K, ...); an empty stack is the base model itself."""

    def initial_params(self, key: Key) -> Tree:
        """Initial values of one client's tensors."""
        ...

    def hidden(self, stack: Tree, batch: Batch) -> Tensor:
        """(T, d): the decoder's last hidden state of each target token of the batch, without the output head; those
        of other tokens need not be there."""
        ...

    def head(self, stack: Tree) -> Head:
        """(V, d): the output head."""
        ...

    def logits(self, params: Tree, tokens: Tensor, mask: Tensor, cache: Any | None) -> tuple[Tensor, Any | None]:
        """Left-padded (B, L) tokens of one client to (B, V) logits of the next token, and the cache to go on with.

        With a cache, `tokens` are the new ones only while `mask` covers all. An adapter without a cache returns None
        and is given all tokens each time.
        """
        ...

    def save(self, params: Tree, folder: Path, base_name: str) -> None:
        """Write the adapter in PEFT's own layout where it has one."""
        ...

    def merged(self, params: Tree, base: Base | None = None) -> Mapping[str, Tensor]:
        """The base model's weights that the adapter changes, with the change folded in, float32.

        `base`: the same model as it was loaded in another dtype, into whose weights it is folded; the default is the
        model that the adapter is attached to, whose weights may be rounded to 16 bits.

        A weight that two layers share, such as a head that is tied to the embedding, stands there under the name of
        each layer for which it changes.
        """
        ...


@runtime_checkable
class Movable(Protocol):
    """An adapter on a base model whose frozen weights a server may move."""

    def fits(self, base_delta: BaseDelta) -> None:
        """
        Raises:
            ClientError: the base delta is not one of these layers.
        """
        ...

    @property
    def num_movable(self) -> int:
        """Values of the frozen weights that a base delta may move."""
        ...

    def moved(self, base_delta: BaseDelta) -> Tree:
        """Constants that stand in for the frozen weights."""
        ...


class ClientExamples(Protocol):
    """What of a client's job an adapter may look at."""

    @property
    def examples(self) -> Sequence[Example]:
        """Its encoded examples."""
        ...

    @property
    def last(self) -> bool:
        """Whether this is the last round."""
        ...

    def rng(self, purpose: str) -> torch.Generator:
        """Its generator in this round."""
        ...


class Scoring(Protocol):
    """A loaded model as its adapter may call it."""

    def losses(self, stack: Tree, batch: Batch) -> Tensor:
        """(K,): one mean loss per client."""
        ...


@runtime_checkable
class WorksOut(Protocol):
    """An adapter with tensors that a client works out of its examples and does not train."""

    def worked_out(self, model: Scoring, params: Tree, job: ClientExamples) -> Tree:
        """These tensors, from all of a client's at the end of its work."""
        ...


@runtime_checkable
class HasBaseline(Protocol):
    """An adapter that has the plain one of its kind among its layers."""

    @property
    def baseline(self) -> Attached:
        """That one, on the same layers."""
        ...


class Adapter:
    """A frozen dataclass of settings that can be attached to a base model."""

    stackable: ClassVar[bool] = False

    @property
    def baseline(self) -> Adapter:
        """The plain adapter of its kind, which methods are compared with."""
        return self

    @property
    def shares(self) -> bool:
        """Whether it does the same to equal beginnings of a client's sequences."""
        return False

    @property
    def needs_weights(self) -> bool:
        """Whether it trains the base model's own matrices, or writes others in their place."""
        return False

    @property
    def virtual_tokens(self) -> int:
        """Positions that it takes in front of every sequence."""
        return 0

    def attach(self, base: Base) -> Attached:
        """Prepare the base model (once per process) and return the adapter on it."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Decoder:
    """The base model's forward passes that the adapters share. `weights` stand in for its own of these names.

    Sequences share a row, or a padded batch; those of a model that cannot be packed run one by one, without padding.
    """

    base: Base
    weights: Mapping[str, Tensor] = field(default_factory=dict)

    def row(self, stack: Mapping[str, Tensor], batch: Batch, offset: int = 0) -> Tensor:
        """(T, d): the last hidden states of a row of sequences, whose positions begin at `offset`."""
        shared, tokens, positions, wanted = batch.shared, batch.tokens, batch.positions + offset, batch.rows
        if shared:
            wanted = shared_prefix(batch.lengths, shared).places[wanted]
        forward = Forward(stack, batch.lengths, batch.client_computed, shared, wanted, batch.dropout, batch.recompute)
        if not shared:
            return self._decoded(forward, "input_ids", tokens, positions)
        kept = shared_prefix(batch.lengths, shared).kept
        hidden = self._decoded(forward, "input_ids", tokens[kept], positions[kept])
        return hidden.index_select(0, shared_prefix(batch.lengths, shared, str(hidden.device)).places)

    def embedded(self, embeddings: Tensor, lengths: Sequence[int], recompute: bool = False) -> Tensor:
        """(T, d): the same from the (T, d) input embeddings of a row of sequences, without adapters in the layers."""
        positions = torch.cat([torch.arange(length) for length in lengths])
        forward = Forward({}, tuple(lengths), recompute=recompute)
        return self._decoded(forward, "inputs_embeds", embeddings, positions)

    def head(self) -> Head:
        """(V, d): the frozen output head."""
        head = self.base.model.get_output_embeddings()
        if isinstance(head, QuantizedLinear):
            return head.product
        weight: Tensor = head.weight
        return weight

    def padded(
        self, stack: Mapping[str, Tensor], inputs: Mapping[str, Tensor], mask: Tensor, cache: Any | None
    ) -> tuple[Tensor, Any]:
        """A left-padded batch, with a cache: (B, V) logits of the next token, and the cache.

        `inputs`: input_ids (B, L) or inputs_embeds (B, L, d) of what the cache does not hold; `mask` covers all.
        """
        width = next(iter(inputs.values())).shape[1]
        if self.base.unpackable is not None:
            real = mask[:, -width:].bool()
            rows = [{name: value[b, keep][None] for name, value in inputs.items()} for b, keep in enumerate(real)]
            return self._apart(stack, rows, cache or [{}] * len(rows))
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -width:]
        # an index, for a slice is not contiguous, and its product with the head would copy the head for every row
        last = torch.tensor([width - 1], device=mask.device)
        passed = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache, "logits_to_keep": last}
        with forward_context(Forward(stack)):
            output = self._call(self.base.model, "", {**inputs, **passed, "use_cache": True})
        return output.logits[:, -1], output.past_key_values

    def _apart(
        self, stack: Mapping[str, Tensor], rows: Sequence[Mapping[str, Tensor]], caches: Sequence[Mapping[str, Any]]
    ) -> tuple[Tensor, Sequence[Mapping[str, Any]] | None]:
        """The same row by row, without padding, each with a cache of its own, or None."""
        caching = self.base.caching
        with forward_context(Forward(stack)):
            outputs = [
                self._call(self.base.model, "", {**row, **cache, "use_cache": caching})
                for row, cache in zip(rows, caches, strict=True)
            ]
        return torch.stack([output.logits[0, -1] for output in outputs]), [
            *map(past_key_values, outputs)
        ] if caching else None

    def _decoded(self, forward: Forward, name: str, row: Tensor, positions: Tensor) -> Tensor:
        if self.base.unpackable is None:
            return self._hidden(forward, {name: row, "position_ids": positions})
        assert forward.lengths is not None and len(forward.client_tokens) <= 1, self.base.unpackable
        alone = replace(forward, lengths=None, client_tokens=())
        return torch.cat([self._hidden(alone, {name: sequence}) for sequence in row.split(forward.lengths)])

    def _hidden(self, forward: Forward, inputs: Mapping[str, Tensor]) -> Tensor:
        model = self.base.model
        passed = {name: value[None].to(model.device) for name, value in inputs.items()}
        with forward_context(forward):
            output = self._call(model.base_model, f"{model.base_model_prefix}.", {**passed, "use_cache": False})
        hidden: Tensor = output.last_hidden_state[0].to(model.dtype)  # Mamba leaves it in float32, whatever its dtype
        return hidden

    def _call(self, module: nn.Module, prefix: str, inputs: Mapping[str, Any]) -> Any:
        if not self.weights:
            return module(**inputs)
        own = {name.removeprefix(prefix): leaf for name, leaf in self.weights.items() if name.startswith(prefix)}
        return functional_call(module, own, (), dict(inputs))


@dataclass(frozen=True, eq=False)
class InLayers:
    """What adapters share that work inside of the decoder's layers: a pass hands them the stack."""

    decoder: Decoder

    def hidden(self, stack: Tree, batch: Batch) -> Tensor:
        """(T, d)."""
        return self.decoder.row(stack, batch)

    def head(self, stack: Tree) -> Head:
        """The frozen head."""
        return self.decoder.head()

    def logits(self, params: Tree, tokens: Tensor, mask: Tensor, cache: Any | None) -> tuple[Tensor, Any | None]:
        """(B, V) of the next token."""
        stack = {name: leaf[None] for name, leaf in params.items()}
        return self.decoder.padded(stack, {"input_ids": tokens}, mask, cache)


def trained_dtype(base: Base) -> torch.dtype:
    """Adapters train in float32, or in float64 on a float64 base."""
    return torch.promote_types(base.model.dtype, torch.float32)
