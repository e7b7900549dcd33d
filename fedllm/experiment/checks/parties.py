"""Parties: all that have a say in an experiment. Stages, the task, the work, the schedule, the aggregator, the demands,
and a client's profile."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import or_

from fedllm.errors import config_name
from fedllm.experiment.record import Experiment
from fedllm.messages.context import Profile
from fedllm.messages.traits import FRAGILE, NONE, Bracket, Fact, Traits
from fedllm.models.adapters.lora import Lora
from fedllm.models.task import Task
from fedllm.stages.base import Stage
from fedllm.stages.personalization.keep import Keep
from fedllm.stages.privacy.no_figures import NoFigures

ONE_MODEL = "binds its masks to one model, the same for all clients"


@dataclass(frozen=True, eq=False)
class Party:
    """One of them.

    Args:
        traits: those that it declares, and what follows from them and from what it is.
        key: of the experiment file, where `name` does not begin with it.
        words: what a sentence says of it in place of the row's words, by fact.
    """

    name: str
    traits: Traits
    key: str = ""
    encodes: bool = False
    receives: bool = False
    words: Mapping[Fact, str] = field(default_factory=dict)


def parties(experiment: Experiment) -> list[Party]:
    """Those that an experiment file names, in the order in which an update meets them."""
    work, schedule, aggregator = experiment.work, experiment.schedule, experiment.aggregator
    found = [
        *_of_task(experiment.task),
        Party(f"work {config_name(work)}", work.traits),
        Party(f"schedule {config_name(schedule)}", schedule.traits),
        *_stages(experiment),
        Party(
            f"aggregator {config_name(aggregator)}", aggregator.traits, words=dict.fromkeys([Fact.ANY_RANK], ONE_MODEL)
        ),
    ]
    if experiment.demands.secrecy:
        found.append(Party("demands.secrecy", Traits(needs=Fact.HIDDEN)))
    return found


def _stages(experiment: Experiment) -> list[Party]:
    first = experiment.pipeline[: len(experiment.pipeline) - len(experiment.stages)]
    asked = {Keep: "keep (task.scope.share asks for it)", NoFigures: "no_figures (evaluation.private asks for it)"}
    return [
        *(_stage(asked[type(stage)], stage) for stage in first),
        *(_stage(config_name(stage), stage) for stage in experiment.stages),
    ]


def client(name: str, profile: Profile, task: Task) -> Party:
    """A client whose device differs in its rank or its bandwidth."""
    words, adapter = dict[Fact, str](), task.adapter
    needs = NONE
    if profile.rank is not None and profile.rank != _rank(task):
        needs |= Fact.ANY_RANK | Fact.ONE_SHAPE
        beside = f" and the adapter rank {adapter.rank}" if isinstance(adapter, Lora) else ""
        text = f"has rank {profile.rank}{beside}"
        words = dict.fromkeys((Fact.ANY_RANK, Fact.ONE_SHAPE, Fact.EQUAL_COMPONENTS), text)
    if profile.bandwidth is not None:
        needs |= Fact.FITTED
        text = f"has a bandwidth of {profile.bandwidth} bytes a round"
        words = {Fact.FITTED: text, Fact.EQUAL_COMPONENTS: text, **words}
    traits = Traits(needs=needs, loses=Fact.EQUAL_COMPONENTS if needs else NONE)
    return Party(f"client {name}", traits, "federation", words=words)


def _of_task(task: Task) -> Iterator[Party]:
    adapter, name, words = task.adapter, config_name(task.adapter), dict[Fact, str]()
    if not isinstance(adapter, Lora):
        words = {
            Fact.FACTORS: f"is {name}, which has none",
            Fact.ANY_RANK: f"is {name}, whose tensors have one shape on all clients",
        }
    elif adapter.init == "singular":
        words = {Fact.ANY_RANK: "has init: singular, whose singular values a client of another rank would lack"}
    loses = reduce(or_, words, NONE)
    if adapter.needs_weights:
        own = " with init: singular" if isinstance(adapter, Lora) else ""
        words[Fact.WRITABLE_BASE] = f"is {name}{own} and changes the matrices of the base model"
    needs = Fact.WRITABLE_BASE if adapter.needs_weights else NONE
    yield Party("task.adapter", Traits(needs=needs, loses=loses), words=words)
    if task.scope.freeze:
        yield Party("task.scope.freeze", Traits(loses=Fact.BOTH_TRAIN | Fact.ANY_RANK))
    if task.scope.alternate:
        yield Party("task.scope.alternate", Traits(loses=Fact.BOTH_TRAIN | Fact.SAME_TENSORS))
    if task.quantize is not None:
        words = {Fact.WRITABLE_BASE: f"holds them in {task.quantize}"}
        yield Party("task.quantize", Traits(loses=Fact.WRITABLE_BASE), words=words)


def _rank(task: Task) -> int | None:
    return task.adapter.rank if isinstance(task.adapter, Lora) else None


def _stage(name: str, stage: Stage) -> Party:
    traits, kind = stage.traits, type(stage)
    encodes, receives = kind.encode is not Stage.encode, kind.receive is not Stage.receive
    needs, keeps = traits.needs | traits.gives, traits.keeps | traits.gives  # what it gives must last
    if encodes or receives:
        needs |= Fact.FIXED_SIZES
    if Fact.BOUNDED in traits.gives:
        needs |= Fact.DIFFERENCE
        if traits.bracket is Bracket.PRIVATE:  # a privacy claim rests on the bound
            needs |= Fact.EQUAL_WEIGHTS | Fact.FIXED_DENOMINATOR
    if traits.bracket is Bracket.ADVERSARY:  # an attack does what it likes
        keeps |= Fact.SUM_OF_DELTAS
    loses = traits.loses | (FRAGILE & ~keeps if encodes else NONE)
    return Party(name, replace(traits, needs=needs, loses=loses), "stages", encodes, receives)
