"""The stages in order: each hook folded over all of them, down to the client and up again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedllm.messages.context import ClientContext, RoundContext
from fedllm.messages.update import Update
from fedllm.stages.base import Stage
from fedllm.tensors.tree import Tree


@dataclass(frozen=True)
class Received:
    """What `receive` left behind, per stage: the scratch, and the names that the stage saw."""

    scratch: tuple[Tree, ...]
    names: tuple[frozenset[str], ...]


def broadcast_all(
    stages: Sequence[Stage], params: Tree, states: Sequence[Tree], ctx: RoundContext
) -> tuple[Tree, tuple[Tree, ...]]:
    """Fold of `broadcast`, in order: what a client is sent."""
    extras = []
    for stage, state in zip(stages, states, strict=True):
        params, extra = stage.broadcast(params, state, ctx)
        extras.append(extra)
    return params, tuple(extras)


def receive_all(
    stages: Sequence[Stage], params: Tree, extras: Sequence[Tree], memories: Sequence[Tree], local: ClientContext
) -> tuple[Tree, Received]:
    """Fold of `receive`, in reverse order: where a client starts."""
    scratch: list[Tree] = []
    names: list[frozenset[str]] = []
    for stage, extra, memory in reversed(list(zip(stages, extras, memories, strict=True))):
        params, kept = stage.receive(params, extra, memory, local)
        scratch.append(kept)
        names.append(frozenset(params))
    return params, Received(tuple(reversed(scratch)), tuple(reversed(names)))


def has_personal(stages: Sequence[Stage]) -> bool:
    """True if a stage gives clients models of their own."""
    return any(type(stage).personal is not Stage.personal for stage in stages)


def personal_all(
    stages: Sequence[Stage], params: Tree, memories: Sequence[Tree], states: Sequence[Tree], client: str
) -> Tree:
    """What a client's model has in place of the server's parameters; of two stages that say so the first counts, for
    it is the last that `receive` passes through."""
    own: Tree = {}
    for stage, memory, state in reversed(list(zip(stages, memories, states, strict=True))):
        own |= stage.personal({**params, **own}, memory, state, client)
    return own


def changes_gradients(stages: Sequence[Stage]) -> bool:
    """True if a stage changes gradients."""
    return any(type(stage).grads is not Stage.grads for stage in stages)


def adjust_grads(stages: Sequence[Stage], arrival: Received, grads: Tree, params: Tree) -> Tree:
    """Fold of `grads`, in order. A stage sees the leaves that passed through its `receive`, no others."""
    for stage, scratch, names in zip(stages, arrival.scratch, arrival.names, strict=True):
        if type(stage).grads is not Stage.grads:
            seen = {name: grad for name, grad in grads.items() if name in names}
            around = {name: leaf for name, leaf in params.items() if name in names}
            grads = {**grads, **stage.grads(seen, around, scratch)}
    return grads


def encode_all(
    stages: Sequence[Stage], update: Update, arrival: Received, memories: Sequence[Tree], local: ClientContext
) -> tuple[Update, tuple[Tree, ...]]:
    """Fold of `encode`, in order: what a client sends, and its memories for the next round."""
    kept = []
    for stage, scratch, memory in zip(stages, arrival.scratch, memories, strict=True):
        update, memory = stage.encode(update, scratch, memory, local)
        kept.append(memory)
    return update, tuple(kept)


def decode_all(
    stages: Sequence[Stage], total: Update, params: Tree, states: Sequence[Tree], ctx: RoundContext
) -> tuple[Update, tuple[Tree, ...]]:
    """Fold of `decode`, in reverse order: the sum becomes the step of the server."""
    kept: list[Tree] = []
    for stage, state in reversed(list(zip(stages, states, strict=True))):
        total, state = stage.decode(total, params, state, ctx)
        kept.append(state)
    return total, tuple(reversed(kept))
