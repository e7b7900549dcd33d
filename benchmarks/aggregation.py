"""`Sum` streams: its peak memory over 100 clients, and its speed on a full model's update against `torch.add`'s.

The update has the shapes of SmolLM2-135M (134,515,008 values, 538 MB in float32) unless `--values` is smaller.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Iterator, Mapping

import torch

from fedllm.aggregators.sum import Sum
from fedllm.messages.call import Replies
from fedllm.messages.context import RoundContext
from fedllm.messages.update import Part, Request, Update
from fedllm.rng import Key


def shapes(values: int) -> list[int]:
    """About 270 tensors, the largest a fifth of them all, as in a small language model."""
    return [values // 5, *[values * 4 // 5 // 270] * 270]


def requests(clients: int) -> dict[str, Request]:
    """One empty request per client."""
    ctx = RoundContext(0, Key(0), clients, clients)
    return {f"client-{place}": Request({}, (), ctx) for place in range(clients)}


def peak_kib() -> int:
    """Peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def peak_ratio(values: int, clients: int) -> float:
    """Growth of the peak while updates arrive one by one, over one update's size."""
    sizes = shapes(values)

    def call(name: str, asked: Mapping[str, Request]) -> Replies:
        for client in asked:
            yield client, Update({"delta": Part({f"w{i}": torch.ones(n) for i, n in enumerate(sizes)}, 1.0)})

    before = peak_kib()
    total = Sum().reduce(call, requests(clients))
    assert float(total.parts["delta"].tree["w0"][0]) == clients
    return (peak_kib() - before) * 1024 / (4 * sum(sizes))


def throughput(values: int, repeats: int) -> dict[str, float]:
    """Bytes added per second: `Sum` from the second update on, and `torch.add` in place on the same tensors."""
    updates = [{f"w{i}": torch.ones(n) for i, n in enumerate(shapes(values))} for _ in range(2)]
    size = 4 * sum(leaf.numel() for leaf in updates[0].values())

    def call(name: str, asked: Mapping[str, Request]) -> Iterator[tuple[str, Update]]:
        for place, client in enumerate(asked):
            yield client, Update({"delta": Part(updates[min(place, 1)], 1.0)})

    summed, added = [], []
    for _ in range(repeats):
        started = time.perf_counter()
        Sum().reduce(call, requests(2))
        summed.append(size / (time.perf_counter() - started))
        started = time.perf_counter()
        for name, leaf in updates[0].items():
            torch.add(leaf, updates[1][name], out=leaf)
        added.append(size / (time.perf_counter() - started))
    ratio = statistics.median(one / other for one, other in zip(summed, added, strict=True))
    return {
        "sum_gb_s": statistics.median(summed) / 1e9,
        "torch_add_gb_s": statistics.median(added) / 1e9,
        "throughput_ratio": ratio,
    }


def main() -> None:
    """Print the figures; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--values", type=int, default=134_515_008)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures = {"peak_over_update": peak_ratio(options.values // 10, options.clients)}
    figures |= throughput(options.values, options.repeats)
    for name, value in figures.items():
        print(f"{name:20} {value:.3f}")
    print(json.dumps({"benchmark": "aggregation", **figures}))


if __name__ == "__main__":
    main()
