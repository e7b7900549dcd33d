"""DP-SGD on every engine: the serial engine's results, whatever shares a stack, and the same bits for any workers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedllm.data.partitioners.by import By
from fedllm.data.shards import Shards
from fedllm.engines.base import Engine
from fedllm.engines.batched.engine import Batched
from fedllm.engines.batched.memory import MemoryEstimate
from fedllm.engines.client import Site
from fedllm.engines.remote.ray import RayActors
from fedllm.engines.serial import Serial
from fedllm.experiment.record import Demands, PrivacyDemand
from fedllm.messages.update import Failure, Update
from fedllm.stages.lora.pad import LoraPad
from fedllm.stages.weighting.uniform import Uniform
from fedllm.tensors.tree import num_bytes
from fedllm.training.dp_sgd import DpSgd
from fedllm.training.sgd import Sgd
from tests.doubles.kept import Kept
from tests.engines.cohort import SIZES, Slice, experiment, farthest, same, sent, write_records
from tests.wide import NARROW, SINGLE

WORK = DpSgd(lr=0.05, steps=3, batch_size=2, max_length=48, clip=0.3, noise_multiplier=0.8, momentum=0.9)
RANKS = {"ann": 1, "ben": 4, "cid": 2, "dot": 3, "eve": 2}
Replies = dict[tuple[int, str], Update | Failure]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_records(tmp_path_factory.mktemp("data") / "records.jsonl")


def replies(engine: Engine, data: Path, **settings: Any) -> Replies:
    """All clients draw from the run's key, by round and name."""
    seeded = Demands(privacy=PrivacyDemand(unit="example", seeded_noise=True))
    return sent(engine, replace(experiment(data, **{"work": WORK, **settings}), demands=seeded))


@pytest.mark.parametrize("stack", [2, 5])
@pytest.mark.parametrize("ranks", [None, RANKS], ids=["equal", "unequal"])
def test_batched_is_serial(data: Path, stack: int, ranks: Any) -> None:
    """Several clients' examples in one stack; 6, 3, 2, 5 and 1 of them. A sum may round to another step of the grid."""
    stages = (Slice(), Uniform()) if ranks else (Uniform(),)
    found = replies(Batched(stack=stack, workers=2), data, ranks=ranks, stages=stages)
    assert farthest(found, replies(Serial(), data, ranks=ranks, stages=stages)) < 2.0**-18
    assert len(found) == 2 * len(SIZES)


@pytest.mark.parametrize("noise_multiplier", [0.0, 0.8])
def test_batched_is_serial_in_float32(data: Path, noise_multiplier: float) -> None:
    work = replace(WORK, noise_multiplier=noise_multiplier)
    found = replies(Batched(workers=2), data, work=work, dtype="float32")
    assert farthest(found, replies(Serial(), data, work=work, dtype="float32")) < SINGLE


def test_the_bits_do_not_depend_on_the_workers(data: Path) -> None:
    one, *others = (replies(Batched(stack=2, workers=workers), data, dtype="float32") for workers in (1, 2, 5))
    for other in others:
        assert all(same(other[key], reply) for key, reply in one.items())


def test_ray_is_serial(data: Path, ray_actors: RayActors) -> None:
    """With the noise of the run's key, which every process has."""
    settings = {"federation": Shards(str(data), partition=By("who"), heldout=0.0)}
    found, expected = (replies(engine, data, **settings) for engine in (Kept(ray_actors), Serial()))
    assert farthest(found, expected) < NARROW


def test_padding_of_unequal_ranks_goes_with_it(data: Path) -> None:
    found = sent(Serial(), experiment(data, work=WORK, ranks=RANKS, stages=(LoraPad(), Uniform())), rounds=1)
    assert all(isinstance(reply, Update) for reply in found.values())


def test_each_example_is_counted_in_the_memory_of_a_stack(data: Path) -> None:
    """Beside `sgd` on the same batch of all 6 and 3 examples: copies for each client, and two gradients an example."""
    site = Site.of(experiment(data, work=WORK), None)
    jobs, costs = [site.first_job(client) for client in ("ann", "ben")], MemoryEstimate.measured(site.model, site.fresh)
    private = replace(WORK, batch_size=6, steps=1)
    plain = Sgd(lr=0.05, steps=1, batch_size=6, max_length=48)
    one = num_bytes(site.fresh)
    for few in (jobs[:1], [replace(jobs[1], examples=[*jobs[1].examples, *jobs[1].examples]), jobs[0]]):
        extra = costs.of(private, few, recompute=False) - costs.of(plain, few, recompute=False)
        assert extra == pytest.approx(one * len(few) * (12 + 2 * 6), abs=2)
