"""Components and experiments at random, for property tests."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass, replace
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin

from hypothesis import assume
from hypothesis import strategies as st

from fedllm.aggregators.base import Aggregator
from fedllm.data.federation import Federation
from fedllm.data.partitioners.base import Partitioner
from fedllm.data.sampling import Sampling
from fedllm.data.shards import Shards
from fedllm.errors import ConfigError
from fedllm.evaluation.settings import Evaluation
from fedllm.experiment.catalog import NOUNS
from fedllm.experiment.reader import hints
from fedllm.experiment.record import Demands, Experiment, Limits
from fedllm.experiment.schedules import Schedule
from fedllm.models.adapters.base import Adapter
from fedllm.models.objectives.base import Objective
from fedllm.models.task import Task
from fedllm.stages.base import Stage
from fedllm.stages.weighting.by_examples import ByExamples
from fedllm.training.base import Work
from fedllm.training.sgd import Sgd

PLAIN = Experiment(task=Task("tiny-llama"), federation=Shards("x"), work=Sgd(steps=1), stages=(ByExamples(),))

# Values are drawn by type alone; what a component refuses is drawn again.

TEXT = st.sampled_from(
    ["organisation", "*lora_B", "a b", "no", "010", "2024-01-01", "é: {x}", "null", "", "chat", "nll"]
)
NUMBERS = st.sampled_from([0.0, 0.1, 1e-3, 0.5, 1.0, 2, 1e-12, 3e5])
SCALARS = {
    bool: st.booleans(),
    int: st.sampled_from([1, 2, 3, 4, 8, 16, 1000]),
    float: NUMBERS,
    str: TEXT,
    type(None): st.none(),
    Any: st.one_of(TEXT, st.integers(), st.booleans(), st.lists(st.integers(), max_size=2)),
}


@cache
def drawn(hint: Any) -> st.SearchStrategy[Any]:
    """Values of a type."""
    inner, origin = get_args(hint), get_origin(hint)
    if hint in NOUNS:
        return st.one_of([components(cls) for cls in NOUNS[hint].values()])
    if is_dataclass(hint):
        return components(hint)
    if origin is Literal:
        return st.sampled_from(inner)
    if origin in (Union, types.UnionType):
        return st.one_of([drawn(option) for option in inner])
    if origin is tuple and inner[-1] is Ellipsis:
        return st.lists(drawn(inner[0]), max_size=3).map(tuple)
    if origin is tuple:
        return st.tuples(*map(drawn, inner))
    if origin is Mapping:
        return st.dictionaries(TEXT, drawn(inner[1]), max_size=2)
    return SCALARS[hint]


@st.composite
def components(draw: st.DrawFn, cls: type) -> Any:
    """An instance of a component, each field at its default or drawn."""
    for _ in range(20):
        chosen = {}
        for item in fields(cls):
            if _required(item) or item.name == "steps" or draw(st.booleans()):
                chosen[item.name] = draw(drawn(hints(cls)[item.name]))
        try:
            return cls(**chosen)
        except ConfigError:
            continue
    assume(False)


def _required(item: Field[Any]) -> bool:
    return item.default is MISSING and item.default_factory is MISSING


def placed(component: Any) -> Experiment:
    """An experiment that holds a component."""
    match component:
        case Stage():
            return replace(PLAIN, stages=(component, ByExamples()))
        case Aggregator():
            return replace(PLAIN, aggregator=component)
        case Work():
            return replace(PLAIN, work=component)
        case Federation():
            return replace(PLAIN, federation=component)
        case Partitioner():
            return replace(PLAIN, federation=Shards("x", partition=component))
        case Sampling():
            return replace(PLAIN, federation=Shards("x", sampling=component))
        case Adapter():
            return replace(PLAIN, task=Task("m", adapter=component))
        case Objective():
            return replace(PLAIN, task=Task("m", objective=component))
        case Schedule():
            return replace(PLAIN, schedule=component)
    raise AssertionError(f"{component} has no place in an experiment")


experiments = st.builds(
    Experiment,
    task=components(Task),
    federation=drawn(Federation),
    work=drawn(Work),
    stages=st.lists(drawn(Stage), max_size=3).map(tuple),
    evaluation=components(Evaluation),
    limits=components(Limits),
    demands=components(Demands),
    rounds=SCALARS[int],
    seed=SCALARS[int],
)
