"""Cohorts of any size on any number of workers and threads: the serial engine's results, and the same bits again."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from fedllm.engines.batched import engine
from fedllm.engines.batched.engine import Batched
from fedllm.engines.serial import Serial
from fedllm.events import EngineStarted, Event
from fedllm.messages.update import Failure, Request, Update
from fedllm.models.adapters.lora import Lora
from fedllm.training.sgd import Sgd
from tests.engines.cohort import experiment, farthest, same, sent
from tests.needs import needs_floats
from tests.wide import SINGLE, widen

pytestmark = pytest.mark.usefixtures("wide")
NINE = tuple(f"c{number}" for number in range(9))
WORK = Sgd(lr=0.05, steps=2, batch_size=2, max_length=48)
Found = Mapping[tuple[int, str], Update | Failure]


@pytest.fixture(scope="module")
def wide() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        widen(patch)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "nine.jsonl"
    rows = [
        {"who": who, "prompt": "ab" * (1 + (place + 3 * number) % 9), "response": "cd" * (1 + place % 5)}
        for place, who in enumerate(NINE)
        for number in range(1 + place % 4)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def serial(data: Path) -> Mapping[str, Found]:
    return {
        dtype: sent(Serial(), experiment(data, dtype=dtype, work=WORK), cohort=NINE, rounds=1)
        for dtype in ("float64", "float32", "bfloat16")
    }


def batched(data: Path, dtype: str, clients: int, told: list[Event] | None = None, **settings: Any) -> Found:
    made = experiment(data, dtype=dtype, work=WORK)
    return sent(Batched(**settings), made, cohort=NINE[:clients], rounds=1, told=told)


@pytest.mark.parametrize("clients", [1, 3, 4, 9])
@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize(("dtype", "bound"), [("float64", 1e-9), ("float32", SINGLE)])
def test_results_are_the_serial_ones(
    serial: Mapping[str, Found], data: Path, clients: int, workers: int, dtype: str, bound: float
) -> None:
    found = batched(data, dtype, clients, workers=workers)
    assert [client for _, client in found] == list(NINE[:clients])
    assert farthest(found, {key: serial[dtype][key] for key in found}) < bound


@pytest.mark.parametrize(("workers", "threads"), [(1, 1), (1, 2), (2, 1), (2, 2), (4, 1), (4, 4), (2, None)])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_equal_settings_give_equal_bits_whatever_else_runs(
    data: Path, dtype: str, workers: int, threads: int | None
) -> None:
    settings: dict[str, Any] = {"workers": workers, "threads": threads}
    expected, done = batched(data, dtype, 3, **settings), threading.Event()

    def distract() -> None:
        x = torch.ones(64, 64)
        while not done.is_set():
            x = (x @ x).clamp(max=1)

    beside = [threading.Thread(target=distract) for _ in range(2)]
    for thread in beside:
        thread.start()
    try:
        again = batched(data, dtype, 3, **settings)
    finally:
        done.set()
        for thread in beside:
            thread.join()
    assert all(same(again[key], expected[key]) for key in expected)


@needs_floats
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_bits_of_kernels_do_not_depend_on_threads(
    serial: Mapping[str, Found], data: Path, dtype: str, threads: int
) -> None:
    """A stack of one client has the serial engine's bits on any number of threads."""
    found = batched(data, dtype, 4, stack=1, workers=2, threads=threads)
    assert all(same(reply, serial[dtype][key]) for key, reply in found.items())


def test_a_set_size_of_stacks_does_not_depend_on_workers(data: Path) -> None:
    one, other = (batched(data, "float64", 9, stack=2, threads=1, workers=workers) for workers in (1, 5))
    assert all(same(reply, other[key]) for key, reply in one.items())


@pytest.mark.parametrize(
    ("dtype", "adapter", "clients", "settings", "in_torch", "in_kernels"),
    [
        ("float64", Lora(rank=2), 1, {"workers": 2}, [2], [2]),
        ("float64", Lora(rank=2), 3, {"workers": 4}, [1] * 3, [1, 1, 2]),  # the fullest has the fourth core
        ("float64", Lora(rank=2), 3, {"workers": 2}, [1, 1], [1, 1]),
        ("float64", Lora(rank=2), 3, {"workers": 4, "stack": 4}, [4], [4]),
        ("float64", Lora(rank=2), 9, {"workers": 2, "threads": 2}, [2, 2], [2, 2]),
        pytest.param("float32", Lora(rank=2), 1, {"workers": 4}, [1], [4], marks=needs_floats),
        pytest.param("float32", Lora(rank=2, dropout=0.1), 1, {"workers": 2}, [2], [2], marks=needs_floats),
    ],
)
def test_threads_of_stacks(
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    adapter: Lora,
    clients: int,
    settings: Mapping[str, int],
    in_torch: Sequence[int],
    in_kernels: Sequence[int],
) -> None:
    """PyTorch's operations get threads where kernels do not compute: both at once would wait for each other's cores."""
    seen, kernels, real, told = list[int](), list[int](), engine.round_trip, list[Event]()

    def watched(site: Any, name: str, asked: Sequence[Request]) -> Any:
        seen.append(torch.get_num_threads())
        return real(site, name, asked)

    @contextmanager
    def counted(count: int) -> Iterator[None]:
        kernels.append(count)
        yield

    monkeypatch.setattr(engine, "round_trip", watched)
    monkeypatch.setattr(engine, "kernel_threads", counted)
    made = experiment(data, dtype=dtype, work=WORK, adapter=adapter)
    sent(Batched(**settings), made, cohort=NINE[:clients], rounds=1, told=told)
    assert (seen, sorted(kernels)) == (in_torch, in_kernels)
    (started,) = [event for event in told if isinstance(event, EngineStarted)]
    assert started.threads == min(in_kernels)
