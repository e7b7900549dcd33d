"""What a client is asked for: by part, of each tensor its type and shape, known before anybody has answered.

The client's half of the pipeline runs once on zeros in the shapes of a request:

    request of zeros -> receive -> a delta of zeros, or the scores of no records -> encode -> types and shapes

They follow from types and shapes alone, and are the same for the whole cohort, because its updates are added up. So a
malformed update is found by itself, whoever answers first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from fedllm.experiment.record import Experiment
from fedllm.messages.context import ClientContext, RoundContext
from fedllm.messages.update import Asked, Part, Request, Update
from fedllm.privacy.noise import KEY_BYTES, NoiseStream
from fedllm.rng import Key
from fedllm.stages.base import Stage
from fedllm.stages.round_trip import encode_all, receive_all
from fedllm.tensors import tree
from fedllm.tensors.layout import LeafSpec
from fedllm.tensors.tree import Tree
from fedllm.training.base import ClientJob, Work

Listed = tuple[tuple[str, LeafSpec], ...]


@dataclass(frozen=True)
class Question:
    """All that the forms of an update follow from. `moving`: the tensors that train; `scores`: of an evaluation."""

    stages: tuple[Stage, ...]
    work: Work
    cohort: int
    population: int
    params: Listed
    extras: tuple[Listed, ...]
    fresh: Listed
    moving: frozenset[str]
    scores: Listed | None


def asked(experiment: Experiment, request: Request, params: Tree, scores: Tree | None = None) -> Asked | None:
    """What a client may send.

    Args:
        params: the server's, of which the request may hold a part. scores: the sums of an evaluation over no records;
            None: the client trains.

    Returns:
        None where it is not known: a stage or the work takes no zeros, or makes sizes of values. An aggregator that
        seals updates makes others of them.
    """
    if any(stage.sizes_follow_values for stage in experiment.pipeline):
        return None
    question = Question(
        stages=experiment.pipeline,
        work=experiment.work,
        cohort=request.ctx.cohort,
        population=request.ctx.population,
        params=_listed(request.params),
        extras=tuple(map(_listed, request.extras)),
        fresh=_listed(params),
        moving=frozenset(name for name in params if experiment.trains_in_round(name, request.ctx.round)),
        scores=None if scores is None else _listed(scores),
    )
    try:
        hash(question)
    except TypeError:  # a setting that is a mapping
        return _answer.__wrapped__(question)
    return _answer(question)


@lru_cache(maxsize=16)  # a run's rounds ask few different questions
def _answer(question: Question) -> Asked | None:
    stages, fresh = question.stages, _zeros(question.fresh)
    memories: list[Tree] = [{} for _ in stages]
    ctx = RoundContext(0, Key(0), question.cohort, question.population, client="")
    local = ClientContext(ctx, initial_params=fresh, noise=_NoNoise())
    try:
        params, arrival = receive_all(
            stages, _zeros(question.params), list(map(_zeros, question.extras)), memories, local
        )
        start = {name: leaf for name, leaf in tree.overlay(fresh, params).items() if name in question.moving}
        made, facts = _made(question, start, ctx)
        update, _ = encode_all(stages, made, arrival, memories, replace(local, facts={**facts, "examples": 1.0}))
    except Exception:  # somebody's own stage or work may need real values: then nothing is known
        return None
    return {name: dict(tree.forms(part.tree)) for name, part in update.parts.items()}


def _made(question: Question, start: Tree, ctx: RoundContext) -> tuple[Update, Mapping[str, float]]:
    """What stands before the stages: of an evaluation, or of a work that takes no step. One value stands for each
    tensor, for the work decides on the types alone."""
    points = {name: leaf.new_zeros(()) for name, leaf in start.items()}
    (outcome,) = question.work.finish(question.work.init([ClientJob(ctx, points, ())]))
    assert not isinstance(outcome, str), outcome
    made, facts = outcome
    if question.scores is not None:
        return Update({"metrics": Part(_zeros(question.scores), 0.0)}), facts
    part = made.parts["delta"]
    delta = {name: part.tree[name].expand(leaf.shape) for name, leaf in start.items()}
    return made.having("delta", replace(part, tree=delta)), facts


class _NoNoise:
    """In place of a client's secret noise: of a dry run on zeros, nothing but types and shapes is looked at."""

    def stream(self, purpose: str, digest: bytes) -> NoiseStream:
        """The noise of a key that everybody knows."""
        return NoiseStream(bytes(KEY_BYTES))


def _listed(leaves: Tree) -> Listed:
    return tuple(tree.forms(leaves).items())


def _zeros(leaves: Listed) -> Tree:
    """Zeros that take the memory of one value each."""
    return {name: torch.zeros((), dtype=dtype).expand(shape) for name, (dtype, shape) in leaves}
