"""Local work in phases: some tensors train while others help or are left out, and then others.

    for each phase:   its tensors train, those beside them stand still, the rest is not in the forward pass
                      the whole plan of the work: the same batches, an optimiser of its own
    delta = where all of them came to - where they began

A phase none of whose tensors train in a round is left out. So what trains in the later phase sees what the earlier one
came to, and never the other way round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

import torch

from fedllm.messages.update import FIGURES, Part, Update
from fedllm.models.batch import collate
from fedllm.models.task import Phase
from fedllm.tensors import tree
from fedllm.tensors.tree import Tree, matches
from fedllm.training.base import ClientJob, Model, Outcome, TrainOptions, Work, batches, run_work

PLAIN = TrainOptions()


@dataclass(eq=False)
class _Progress:
    """Where a client is between two phases."""

    job: ClientJob
    values: Tree
    made: list[tuple[Update, Mapping[str, float]]] = field(default_factory=list)
    failed: str = ""

    def of(self, phase: Phase) -> ClientJob:
        """Its job in a phase."""
        trains = {name: leaf for name, leaf in self.values.items() if matches(name, phase.train)}
        others = {**self.job.frozen, **{name: leaf for name, leaf in self.values.items() if name not in trains}}
        beside = {name: leaf for name, leaf in others.items() if matches(name, phase.beside)}
        return replace(self.job, initial=tree.flatten(trains), frozen=beside, phases=())

    def note(self, outcome: Outcome) -> None:
        """What came of a phase."""
        if isinstance(outcome, str):
            self.failed = outcome
            return
        update, facts = outcome
        delta = update.parts["delta"].tree
        self.values = {**self.values, **{name: self.values[name] + leaf for name, leaf in delta.items()}}
        self.made.append((update, facts))


def run_phases(work: Work, jobs: Sequence[ClientJob], model: Model, how: TrainOptions = PLAIN) -> Sequence[Outcome]:
    """The local work of a stack of clients: its phases, and then what is worked out of a client's examples and not
    trained; without phases all at once.

    Raises:
        Stopped: `how.should_continue` said no.
    """
    if not jobs or not jobs[0].phases:
        return run_work(work, jobs, model, how)
    clients = [_Progress(job, dict(job.initial)) for job in jobs]
    for phase in jobs[0].phases:
        alive = [client for client in clients if not client.failed]
        some = [client.of(phase) for client in alive]
        if not some or not some[0].initial:
            continue
        for client, outcome in zip(alive, run_work(work, some, model, how), strict=True):
            client.note(outcome)
    return [client.failed or _combined(client, work, model) for client in clients]


def _combined(client: _Progress, work: Work, model: Model) -> Outcome:
    """One outcome: the whole delta, the mean of the figures over the phases, the sum of the counts. `steps` and
    `lr_sum` are those of the last phase, for each tensor trains in one."""
    job = client.job
    values = {**client.values, **_within(job.initial, model.worked_out({**job.frozen, **client.values}, job))}
    if not client.made:
        client.made.append(_resting(work, replace(job, initial=values), model))
    parts = {"delta": Part(tree.sub(values, job.initial))}
    for name in sorted(FIGURES):
        trees = [update.parts[name].tree for update, _ in client.made if name in update.parts]
        if trees:
            share = 1.0 if name == "counts" else 1 / len(trees)
            mean = {leaf: torch.stack([found[leaf] for found in trees]).sum(0) * share for leaf in trees[0]}
            parts[name] = Part(mean, 0.0 if name == "counts" else None)
    facts = dict(client.made[-1][1]) if client.made else {"steps": 0.0, "lr_sum": 0.0, "tokens": 0.0}
    for count in ("tokens", "computed"):
        facts[count] = sum(each.get(count, 0.0) for _, each in client.made)
    return Update(parts), facts


@torch.no_grad()
def _resting(work: Work, job: ClientJob, model: Model) -> tuple[Update, Mapping[str, float]]:
    """Figures of a round in which nothing trains: the loss of what would have been the first batch, and no steps."""
    (done,) = work.finish(work.init([replace(job, initial={}, frozen={}, phases=())]))
    assert not isinstance(done, str)
    update, facts = done
    for micro in islice(batches(work, [job]), 1):
        stack = {name: leaf[None] for name, leaf in {**job.frozen, **job.initial}.items()}
        loss = model.losses(stack, collate(micro[0])).double().cpu()[0]
        update = Update({**update.parts, "metrics": Part({"loss": loss})})
    return update, facts


def _within(known: Tree, found: Tree) -> Tree:
    """What of `found` is a tensor of the client's, in its type."""
    return {name: leaf.to(known[name]) for name, leaf in found.items() if name in known}
