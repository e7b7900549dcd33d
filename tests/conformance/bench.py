"""Two clients of unequal size who train a tiny model in float64, and the same clients without any of fedllm's stages.

`Bench.run` is the real thing: check, engine, wire, loop, checkpoints. `descend` and `trained` are the local work
alone, for textbook loops beside it. Everything is remembered, so a run that several checks need is made once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from fedllm.data.partitioners.by import By
from fedllm.data.shards import ClientOutage, Shards
from fedllm.engines.base import Engine
from fedllm.engines.client import Prepared, Site
from fedllm.engines.client_store import ClientStore
from fedllm.engines.serial import Serial
from fedllm.evaluation.settings import Evaluation
from fedllm.experiment.catalog import NOUNS
from fedllm.experiment.record import Experiment, Limits
from fedllm.messages.context import Profile, RoundContext
from fedllm.messages.traits import Fact
from fedllm.messages.update import Update
from fedllm.models.adapters.base import Adapter
from fedllm.models.adapters.lora import Lora
from fedllm.models.batch import Batch, collate
from fedllm.models.loaded_model import LoadedModel, load
from fedllm.models.task import Task
from fedllm.runs import launch
from fedllm.runs.checkpoints import Checkpoints
from fedllm.runs.server_round import requests_for
from fedllm.runs.state import ServerState
from fedllm.stages.base import Stage
from fedllm.stages.round_trip import encode_all
from fedllm.tensors.directions import directions, seed_key
from fedllm.tensors.tree import Tree
from fedllm.training.base import ClientJob, Work, run_work
from fedllm.training.sgd import Sgd
from fedllm.training.zeroth_order import ZerothOrder
from tests.engines import cohort

ROUNDS, STEPS, LR = 2, 3, 0.2
BANDWIDTH = 3000  # bytes: some components of those that a client has, for stages that keep to it
UNEQUAL = (("a", 5), ("b", 3))
EQUAL = (("a", 4), ("b", 4))  # 4 is a power of two: weighing by it loses no bit
RANK, ALPHA = 2, 4
TASK = Task("tiny-llama", adapter=Lora(rank=RANK, alpha=ALPHA, targets=("q_proj",)), dtype="float64")
WORK = Sgd(lr=LR, steps=STEPS, batch_size=2, max_length=32)

ZEROTH_ORDER = ZerothOrder(lr=0.01, steps=STEPS, batch_size=2, max_length=32, pool=4)

Sizes = tuple[tuple[str, int], ...]


@dataclass(frozen=True, eq=False)
class Course:
    """A finished run: the server after each number of complete rounds."""

    folder: Path
    after: tuple[ServerState, ...]

    @property
    def params(self) -> Tree:
        return self.after[-1].params


@dataclass(eq=False)
class Bench:
    folder: Path
    engine: Engine = Serial()
    task: Task = TASK
    work: Work = WORK
    courses: dict[tuple[object, ...], Course] = field(default_factory=dict)
    others: dict[str, Bench] = field(default_factory=dict)
    model: LoadedModel = field(init=False)

    def __post_init__(self) -> None:
        self.model = load(self.task)

    def of(self, stage: Stage) -> Bench:
        """The bench with the adapter that a stage works on."""
        kind = stage.traits.adapter
        if "scalars" in stage.traits.takes and "zeroth order" not in self.others:
            folder = self.folder / "zeroth_order"
            folder.mkdir()
            self.others["zeroth order"] = Bench(folder, self.engine, self.task, ZEROTH_ORDER)
        if "scalars" in stage.traits.takes:
            return self.others["zeroth order"]
        if kind is None:
            return self
        if kind not in self.others:
            made, own = NOUNS[Adapter][kind], vars(self.task.adapter)
            adapter = made(**{item.name: own[item.name] for item in fields(made) if item.name in own})
            folder = self.folder / kind
            folder.mkdir()
            self.others[kind] = Bench(folder, self.engine, replace(self.task, adapter=adapter))
        return self.others[kind]

    def experiment(self, stages: Sequence[Stage], *, sizes: Sizes = UNEQUAL, lost: Sequence[int] = ()) -> Experiment:
        """`lost`: rounds in which nobody answers."""
        data = self.folder / ("-".join(f"{who}{count}" for who, count in sizes) + ".jsonl")
        if not data.exists():
            pairs = [(who, i) for who, count in sizes for i in range(count)]
            rows = [{"who": who, "prompt": f"{who} {i}?", "response": f"{i * i}!"} for who, i in pairs]
            data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        profiles = (
            {"*": Profile(bandwidth=BANDWIDTH)} if any(Fact.FITTED in stage.traits.gives for stage in stages) else {}
        )
        failures = tuple(ClientOutage(who, round) for round in lost for who, _ in sizes)
        return Experiment(
            task=self.task,
            federation=Shards(str(data), partition=By("who"), heldout=0.0, failures=failures, profiles=profiles),
            work=self.work,
            stages=tuple(stages),
            evaluation=Evaluation(metrics=(), private=False),
            limits=Limits(keep_last=9),
            rounds=ROUNDS,
            seed=3,
        )

    def run(self, stages: Sequence[Stage], *, sizes: Sizes = UNEQUAL, lost: tuple[int, ...] = ()) -> Course:
        """A run from start to end."""
        key = (tuple(stages), tuple(map(type, stages)), sizes, lost)
        if key not in self.courses:
            self.courses[key] = self.start(self.experiment(stages, sizes=sizes, lost=lost))
        return self.courses[key]

    def start(self, experiment: Experiment, *, in_pieces: bool = False) -> Course:
        """A new run; or one that is stopped and resumed after each of its rounds."""
        out = self.folder / f"run-{len(list(self.folder.glob('run-*')))}"
        if in_pieces:
            cohort.in_pieces(experiment, out, self.engine)
        else:
            launch.run(experiment, engine=self.engine, out=out)
        saved = Checkpoints(out / "checkpoints", 9)
        return Course(out, tuple(run for n in range(ROUNDS + 1) if (run := saved.load(n)) is not None))

    def visit(self, stages: Sequence[Stage], client: str = "a") -> tuple[Site, Prepared]:
        """A client in round 1 of a run, with what it remembers of round 0, before its local work."""
        course, experiment = self.run(stages), self.experiment(stages)
        population = experiment.federation.load(experiment.key)
        store = ClientStore(course.folder / "checkpoints" / "clients", 9)
        site = Site(experiment, self.model, population, store)
        everyone = RoundContext(1, experiment.key, 2, 2, ROUNDS)
        return site, site.prepare(requests_for(experiment, course.after[1], ["a", "b"], everyone)[client])

    # The local work alone. Parameters are one flat vector: the leaves in the order of their names.

    def fresh(self) -> Tensor:
        return flat(self.model.initial_params(self.experiment(()).key))

    def tree(self, vector: Tensor) -> Tree:
        shapes = {name: leaf.shape for name, leaf in sorted(self.model.initial_params(self.experiment(()).key).items())}
        pieces = vector.split([shape.numel() for shape in shapes.values()])
        return {name: piece.reshape(shape) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)}

    def job(self, client: str, round: int, start: Tensor, sizes: Sizes) -> ClientJob:
        experiment = self.experiment((), sizes=sizes)
        records = experiment.federation.load(experiment.key).train[client]
        examples = [example for record in records if (example := self.model.encode(record, WORK.max_length))]
        slot = [who for who, _ in sizes].index(client)
        ctx = RoundContext(round, experiment.key, len(sizes), len(sizes), ROUNDS, client, slot)
        return ClientJob(ctx, self.tree(start), examples, lambda grads, params: grads)

    def trained(self, client: str, round: int, start: Tensor, sizes: Sizes = UNEQUAL) -> Tensor:
        """The delta of the work itself, without stages."""
        (outcome,) = run_work(self.work, [self.job(client, round, start, sizes)], self.model)
        assert not isinstance(outcome, str), outcome
        return flat(outcome[0].parts["delta"].tree)

    def descend(
        self, client: str, round: int, start: Tensor, correct: Callable[[Tensor, Tensor], Tensor], sizes: Sizes
    ) -> Tensor:
        """The delta of y <- y - lr correct(g(y), y), written out."""
        job, y = self.job(client, round, start, sizes), start.clone()
        if isinstance(self.work, ZerothOrder):
            return self.difference(job, y) - start
        for micro in WORK.plan(len(job.examples), job.ctx):
            batch = collate([[job.examples[index] for index in micro[0]]])
            leaves = {name: leaf[None].clone().requires_grad_() for name, leaf in self.tree(y).items()}
            (loss,) = self.model.losses(leaves, batch)
            grads = torch.autograd.grad(loss, [leaves[name] for name in sorted(leaves)])
            y = y - LR * correct(torch.cat([grad.reshape(-1) for grad in grads]), y)
        return y - start

    def difference(self, job: ClientJob, y: Tensor) -> Tensor:
        """Where steps along directions out of the pool come to, written out with whole vectors."""
        work, choice = self.work, job.ctx.rng("directions")
        assert isinstance(work, ZerothOrder)
        for micro in work.plan(len(job.examples), job.ctx):
            batch = collate([[job.examples[index] for index in micro[0]]])
            z = flat(dict(directions(self.tree(y), seed_key(int(torch.randint(4, (1,), generator=choice))))))

            def loss(at: Tensor, batch: Batch = batch) -> Tensor:
                return self.model.losses({name: leaf[None] for name, leaf in self.tree(at).items()}, batch)[0]

            slope = (loss(y + work.eps * z) - loss(y - work.eps * z)) / (2 * work.eps)
            y = y - work.lr * slope * z
        return y


def flat(leaves: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([leaves[name].reshape(-1) for name in sorted(leaves)])


def come_to(run: ServerState) -> Tensor:
    """The parameters of a run, and what was added to its frozen weights."""
    return torch.cat(
        [flat(run.params), *(run.base_delta.dense(layer).reshape(-1) for layer in run.base_delta.layers())]
    )


def sent_by(site: Site, prepared: Prepared) -> tuple[Update, tuple[Tree, ...]]:
    """What a visited client sends, and what it remembers."""
    (outcome,) = run_work(site.experiment.work, [prepared.job], prepared.model)
    assert not isinstance(outcome, str), outcome
    update, facts = outcome
    local = replace(prepared.local, facts={**facts, "examples": float(len(prepared.job.examples))})
    return encode_all(site.stages, update, prepared.arrival, prepared.memories, local)
