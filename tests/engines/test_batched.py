"""The batched engine gives what the serial one gives: client by client, in every order, for any number of workers."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

import fedllm
from fedllm.engines.batched.engine import Batched
from fedllm.engines.batched.memory import layout_bytes
from fedllm.engines.client_store import ClientStore
from fedllm.engines.serial import Serial
from fedllm.events import ClientFailed, EngineStarted, Event
from fedllm.messages.update import Failure, Update
from fedllm.models.adapters import lora
from fedllm.models.adapters.base import Adapter
from fedllm.models.adapters.lora import Lora
from fedllm.models.adapters.soft_prompt import SoftPrompt
from fedllm.models.kernels import matmul
from fedllm.models.kernels.matmul import Matrix
from fedllm.models.layers import attention
from fedllm.models.loaded_model import load
from fedllm.models.task import Task
from fedllm.runs.checkpoints import Checkpoints
from fedllm.stages.base import Stage
from fedllm.stages.client_drift.prox import Prox
from fedllm.stages.client_drift.scaffold import Scaffold
from fedllm.stages.compression.top_k import TopK
from fedllm.stages.server_optimizers.momentum import Momentum
from fedllm.stages.weighting.uniform import Uniform
from fedllm.tensors import tree
from fedllm.training.sgd import Sgd
from tests.engines.cohort import (
    ADAMW,
    CLIENTS,
    LORA,
    SGD,
    Own,
    Slice,
    Spoil,
    Watched,
    apart,
    experiment,
    farthest,
    same,
    sent,
    write_long,
    write_records,
)
from tests.needs import needs_products
from tests.wide import SINGLE, widen

pytestmark = pytest.mark.usefixtures("wide")
SOFT = SoftPrompt(tokens=3)
RANKS = {"ann": 4, "ben": 1, "cid": 2, "dot": 4, "eve": 3}


@pytest.fixture(scope="module")
def wide() -> Iterator[None]:
    """Both engines compute in float64 throughout, so that sums in another order are as near as float64 is."""
    with pytest.MonkeyPatch.context() as patch:
        widen(patch)
        yield


def full_trip(work: Sgd) -> list[Stage]:
    """State on the server and on the clients, hooks in each step, and what may flip on a rounding."""
    allow = () if work.rule == "sgd" else (work.rule,)
    return [Momentum(beta=0.5), Scaffold(allow), Prox(0.1), TopK(0.3), Uniform()]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_records(tmp_path_factory.mktemp("data") / "people.jsonl")


@pytest.fixture(scope="module")
def serial(data: Path) -> Callable[..., Mapping[Any, Update | Failure]]:
    """What the serial engine sends, worked out once per setting."""
    known: dict[str, Mapping[Any, Update | Failure]] = {}

    def of(**settings: Any) -> Mapping[Any, Update | Failure]:
        key = repr(sorted(settings.items(), key=lambda item: item[0]))
        if key not in known:
            known[key] = sent(Serial(), experiment(data, **settings))
        return known[key]

    return of


# the same updates


@pytest.mark.parametrize("work", [SGD, ADAMW], ids=["momentum", "adamw"])
@pytest.mark.parametrize("adapter", [LORA, SOFT], ids=["lora", "soft"])
def test_whole_runs_with_state_everywhere(data: Path, tmp_path: Path, adapter: Adapter, work: Sgd) -> None:
    """Equal ranks: server momentum, SCAFFOLD, Prox and top-k. The second round starts from what the first one made."""
    made = experiment(data, adapter=adapter, work=work, stages=full_trip(work))
    one, other = Watched(Serial()), Watched(Batched(stack=2, workers=2))
    expected = fedllm.run(made, engine=one, out=tmp_path / "serial")
    found = fedllm.run(made, engine=other, out=tmp_path / "batched")
    assert len(one.sent) == 2 * len(CLIENTS)
    assert farthest(other.sent, one.sent) < 1e-9
    assert tree.norm(tree.sub(found.params, expected.params)) < 1e-9 * tree.norm(expected.params)


@pytest.mark.parametrize("work", [SGD, ADAMW], ids=["momentum", "adamw"])
def test_mixed_ranks_one_update_at_a_time(serial: Any, data: Path, work: Sgd) -> None:
    settings: dict[str, Any] = {"work": work, "ranks": RANKS, "stages": (Slice(), Prox(0.1), TopK(0.3), Uniform())}
    expected, found = serial(**settings), sent(Batched(stack=3, workers=2), experiment(data, **settings))
    assert farthest(found, expected) < 1e-9
    for (_, client), reply in found.items():
        assert isinstance(reply, Update)
        shapes = {leaf.shape[0 if name.endswith("lora_A") else 1] for name, leaf in reply.parts["delta"].tree.items()}
        assert shapes == {RANKS[client]}


@pytest.mark.parametrize("adapter", [LORA, SOFT, Lora(rank=4, dropout=0.3)], ids=["lora", "soft", "dropout"])
@pytest.mark.parametrize("stack", [1, 2, 3, 4])
def test_stacks_of_any_size(serial: Any, data: Path, adapter: Adapter, stack: int) -> None:
    expected = serial(adapter=adapter)
    found = sent(Batched(stack=stack, workers=2), experiment(data, adapter=adapter))
    assert farthest(found, expected) < 1e-9
    if stack == 1:
        assert all(same(found[key], expected[key]) for key in expected), "to the bit"


@pytest.mark.parametrize("adapter", [LORA, SOFT], ids=["lora", "soft"])
def test_float32_with_sgd(serial: Any, data: Path, adapter: Adapter) -> None:
    settings: dict[str, Any] = {"adapter": adapter, "dtype": "float32", "stages": (Prox(0.1), Uniform())}
    assert farthest(sent(Batched(workers=2), experiment(data, **settings)), serial(**settings)) < SINGLE
    alone = sent(Batched(stack=1, workers=2), experiment(data, **settings))
    assert all(same(alone[key], reply) for key, reply in serial(**settings).items())


OWN = (
    *(("ann", "lr", 0.2), ("ann", "batch_size", 3), ("ben", "epochs", 2), ("ben", "batch_size", 1)),
    *(("cid", "steps", 5), ("cid", "accumulation", 2), ("dot", "epochs", 1), ("dot", "clip_norm", 0.1)),
    *(("eve", "optimizer", "adamw"), ("eve", "momentum", 0.0), ("eve", "lr", 0.01)),
)


def test_devices_with_ranks_batches_steps_and_rates_of_their_own(serial: Any, data: Path) -> None:
    own = Own(lr=0.05, steps=3, batch_size=2, max_length=48, momentum=0.9, own=OWN)
    settings: dict[str, Any] = {"work": own, "ranks": RANKS, "stages": (Slice(), Prox(0.1), Uniform())}
    expected, found = serial(**settings), sent(Batched(stack=4, workers=2), experiment(data, **settings))
    assert farthest(found, expected) < 1e-9
    counts = {client: expected[0, client].parts["counts"].tree for client in CLIENTS}
    assert [int(counts[client]["steps"]) for client in CLIENTS] == [3, 6, 5, 3, 3]
    assert [found[0, client].parts["counts"].tree for client in CLIENTS] == list(counts.values())


# how large a stack is


@pytest.mark.parametrize(
    ("asked", "dtype", "length", "batch_size", "size"),
    [
        (None, "float64", 24, 1, 16),
        (None, "float64", 64, 1, 8),
        (None, "float64", 42, 2, 6),  # 512 / 84
        (None, "float32", 42, 2, 8),  # less the 20 tokens that both begin with, whose successors are no answer
        (None, "float64", 163, 1, 4),
        (3, "float64", 24, 1, 3),
        (20, "float64", 163, 1, 20),
    ],
)
@pytest.mark.parametrize("workers", [1, 3])
def test_short_batches_make_large_stacks_unless_a_size_is_set(
    tmp_path: Path, asked: int | None, dtype: str, length: int, batch_size: int, size: int, workers: int
) -> None:
    work = Sgd(lr=0.05, steps=1, batch_size=batch_size, max_length=length)
    made = experiment(write_long(tmp_path / "people.jsonl"), dtype=dtype, work=work)
    told: list[Event] = []
    sent(Batched(stack=asked, workers=workers), made, cohort=CLIENTS[:2], told=told)
    assert [event.stack for event in told if isinstance(event, EngineStarted)] == [size]


def test_clients_without_a_step_say_nothing_of_the_size(data: Path) -> None:
    told: list[Event] = []
    sent(Batched(workers=1), experiment(data, work=Sgd(lr=0.05, steps=0)), told=told)
    assert [event.stack for event in told if isinstance(event, EngineStarted)] == [4]


@pytest.mark.usefixtures("unfrozen")
def test_what_is_loaded_is_settled_while_the_engine_is_open(data: Path) -> None:
    assert not gc.get_freeze_count()
    with Batched(workers=1).open(experiment(data), None, [].append):
        assert gc.get_freeze_count()
    assert not gc.get_freeze_count()


@needs_products
@pytest.mark.parametrize(("engine", "kept"), [(Batched(), True), (Batched(memory_budget="2GB"), False)])
def test_frozen_weights_are_laid_out_where_memory_is_not_scarce(
    data: Path, monkeypatch: pytest.MonkeyPatch, engine: Batched, kept: bool
) -> None:
    """And change no bit."""
    made, seen, lay_out = experiment(data, dtype="bfloat16"), list[Matrix](), matmul.laid_out

    def watched(matrix: Matrix) -> Tensor:
        seen.append(matrix)
        return lay_out(matrix)

    monkeypatch.setattr(matmul, "laid_out", watched)
    expected = sent(Serial(), made)
    assert not seen
    found = sent(engine, made)
    assert bool(seen) == kept and len({id(matrix.weight) for matrix in seen}) >= len(seen) // 2
    assert all(same(found[key], expected[key]) for key in expected)


@needs_products
def test_layouts_have_their_share_of_the_budget_or_are_not_made() -> None:
    model = load(Task("tiny-llama", Lora(), dtype="bfloat16", device="cpu"))
    base = model.base.model
    head = base.get_output_embeddings()  # of an odd number of words, which the kernel does not take
    linears = [module for module in base.modules() if isinstance(module, nn.Linear) and module is not head]
    whole = 2 * 2 * sum(linear.weight.numel() for linear in linears)
    assert layout_bytes(model, 4 * whole) == whole
    assert layout_bytes(model, 4 * whole - 4) == 0
    assert layout_bytes(load(Task("tiny-llama", Lora(), dtype="float64", device="cpu")), 10**12) == 0


# a comparison that would not see a mistake proves nothing


def swapped(*args: Any) -> Tensor:
    """The adapters of two clients of a stack change places."""
    x, dropped, frozen, (a, b), sizes, scale = args
    return real_low_rank(x, dropped, frozen, (a.flip(0), b.flip(0)), sizes, scale)


def crossing(query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], *args: Any) -> Tensor:
    """A sequence sees those before it in its row."""
    return real_attention(query, key, value, (sum(lengths),), *args)


real_low_rank, real_attention = lora.low_rank_linear, attention.short_attention


@pytest.mark.parametrize(
    ("module", "name", "wrong"), [(lora, "low_rank_linear", swapped), (attention, "short_attention", crossing)]
)
def test_a_wrong_engine_is_seen(
    serial: Any, data: Path, monkeypatch: pytest.MonkeyPatch, module: Any, name: str, wrong: Any
) -> None:
    settings: dict[str, Any] = {"work": Sgd(lr=0.05, steps=2, batch_size=1, max_length=48)}
    expected = serial(**settings)
    monkeypatch.setattr(module, name, wrong)
    found = sent(Batched(stack=2, workers=1), experiment(data, **settings))
    # eve is alone in its stack, with one sequence in it
    assert max(apart(found[key], expected[key]) for key in expected if key[1] != "eve") > 1e-3
    assert all(same(found[round, "eve"], expected[round, "eve"]) for round in (0, 1))


# the same bits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_number_of_workers(data: Path, tmp_path: Path, dtype: str) -> None:
    """Parameters, the server's states and the clients' memories after two rounds."""
    made = experiment(data, dtype=dtype, work=ADAMW, stages=full_trip(ADAMW))
    digests = []
    for workers in (1, 2, 5):
        folder = tmp_path / str(workers)
        fedllm.run(made, engine=Batched(stack=2, workers=workers), out=folder)
        run = Checkpoints(folder / "checkpoints", 2).load()
        store = ClientStore(folder / "checkpoints" / "clients")
        assert run is not None and run.round == 2
        kept = [memory for client in CLIENTS for memory in store.load(client, 2, len(made.pipeline))]
        assert sum(map(bool, kept)) == 2 * len(CLIENTS)
        digests.append([tree.digest(part) for part in (run.params, *run.states, *kept)])
    assert digests[0] == digests[1] == digests[2]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("adapter", [LORA, SOFT], ids=["lora", "soft"])
def test_a_clients_data_changes_no_bit_of_another(data: Path, tmp_path: Path, adapter: Adapter, dtype: str) -> None:
    other = write_records(tmp_path / "people.jsonl", changed="cid")
    before, after = (
        sent(Batched(stack=3, workers=2), experiment(path, adapter=adapter, dtype=dtype)) for path in (data, other)
    )
    assert {key[1] for key in before if not same(before[key], after[key])} == {"cid"}
    assert not any(same(before[round, "cid"], after[round, "cid"]) for round in (0, 1))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("adapter", [LORA, SOFT], ids=["lora", "soft"])
def test_a_client_that_turns_nan_is_lost_by_name_and_alone(
    data: Path, tmp_path: Path, adapter: Adapter, dtype: str
) -> None:
    made = [
        experiment(data, adapter=adapter, dtype=dtype, stages=(Spoil(client), Uniform())) for client in (None, "ben")
    ]
    well, ill = (sent(Batched(stack=3, workers=2), settings) for settings in made)
    assert {key[1] for key in well if not same(well[key], ill[key])} == {"ben"}
    told: list[Event] = []
    fedllm.run(made[1], engine=Batched(stack=3, workers=2), out=tmp_path / "run", listeners=[told.append])
    lost = [event for event in told if isinstance(event, ClientFailed)]
    assert [(event.round, event.client) for event in lost] == [(0, "ben"), (1, "ben")]
    assert lost[0].reason == "at step 1 its loss is nan; lower work.sgd.lr or set work.sgd.clip_norm"
    run = Checkpoints(tmp_path / "run" / "checkpoints", 2).load()
    assert run is not None and math.isfinite(tree.norm(run.params))


def test_a_learning_rate_that_is_too_large_fails_its_device_alone(data: Path) -> None:
    own = Own(lr=0.05, steps=3, batch_size=2, max_length=48)
    wild = Own(lr=0.05, steps=3, batch_size=2, max_length=48, own=(("ben", "lr", 1e30),))
    well, ill = (
        sent(Batched(stack=3, workers=2), experiment(data, dtype="float32", work=work)) for work in (own, wild)
    )
    assert {key[1] for key in well if not same(well[key], ill[key])} == {"ben"}
    assert isinstance(ill[0, "ben"], Failure)


# a model of a real size


@pytest.mark.model
def test_smollm2_in_float32(smollm2: str, data: Path) -> None:
    settings: dict[str, Any] = {"model": smollm2, "work": Sgd(lr=0.05, steps=2, batch_size=1, max_length=48)}
    made = experiment(data, dtype="float32", **settings)
    one, other = (sent(engine, made, cohort=CLIENTS[:3]) for engine in (Serial(), Batched(stack=3, workers=2)))
    assert farthest(other, one) < 1e-5
