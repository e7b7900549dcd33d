"""Seconds of a local step of the serial engine over those of a bare loop, and of an empty round.

The bare loop (bare.py) imports nothing of fedllm and works on the same model, tokens and dtype. Both take the same
`--steps` steps in turn, `--pairs` times; the median of the ratios counts. `--pairs 0` leaves the steps out.

The empty round is that of LoRA on all linear layers, which has the most tensors; that on q and v stands beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from bare import BareLoop

from fedllm.engines.allocator import retain_freed_memory
from fedllm.engines.client import Site
from fedllm.engines.client_store import ClientStore
from fedllm.events import Event
from fedllm.experiment.config_file import load
from fedllm.experiment.record import Experiment
from fedllm.messages import serialization
from fedllm.messages.context import RoundContext
from fedllm.models.base_models.load import materialise
from fedllm.models.loaded_model import load as load_model
from fedllm.runs import server_round
from fedllm.runs.checkpoints import Checkpoints
from fedllm.training.base import ClientJob, run_work


def seconds(action: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def step_ratios(experiment: Experiment, pairs: int) -> dict[str, float]:
    """Paired: the two sides take turns on the same examples."""
    model, population, work = load_model(experiment.task), experiment.federation.load(experiment.key), experiment.work
    client = population.clients[0]
    encoded = model.encode_all(population.train[client], work.max_length)
    examples = [example for example in encoded if example is not None]
    lora = experiment.task.adapter
    bare = BareLoop(
        str(materialise(model.base)), rank=lora.rank, alpha=lora.alpha, lr=work.lr, dtype=model.base.model.dtype
    )
    start, ours, theirs = model.initial_params(experiment.key), [], []
    for pair in range(pairs + 1):
        ctx = RoundContext(pair, experiment.key, 1, 1, pairs + 1, client=client)
        job = ClientJob(ctx, start, examples, lambda grads, params: grads)
        batches = [[examples[i] for micro in step for i in micro] for step in work.plan(len(examples), ctx)]
        ours.append(seconds(lambda job=job: run_work(work, [job], model)))
        theirs.append(
            seconds(lambda batches=batches: [bare.step([(e.tokens, e.targets) for e in batch]) for batch in batches])
        )
    ratios = [mine / other for mine, other in zip(ours[1:], theirs[1:], strict=True)]
    return {
        "step_s_fedllm": statistics.median(ours[1:]) / work.steps,
        "step_s_bare": statistics.median(theirs[1:]) / work.steps,
        "step_ratio": statistics.median(ratios),
        "step_ratio_min": min(ratios),
        "step_ratio_max": max(ratios),
    }


def empty_round(experiment: Experiment, rounds: int) -> dict[str, float]:
    """A round of one client without local work; packing and checkpoint apart."""
    model, population = load_model(experiment.task), experiment.federation.load(experiment.key)
    site = Site(experiment, model, population, ClientStore(None))
    state = server_round.initial_state(experiment, model.initial_params(experiment.key))
    first = population.clients[:1]

    def call(name, requests):
        for client, request in requests.items():
            yield client, site.answer(name, request)

    def quiet(event: Event) -> None:
        del event

    with retain_freed_memory():  # as the engines do
        times = [
            seconds(lambda: server_round.run_round(state, experiment, first, call, quiet)) for _ in range(rounds + 3)
        ][3:]
    request = next(iter(server_round.requests_for(experiment, state, first, RoundContext(0, state.key, 1, 1)).values()))
    update = site.answer("work", request)
    packing = [
        seconds(
            lambda: (
                serialization.deserialize(serialization.serialize(request)),
                serialization.deserialize(serialization.serialize(update)),
            )
        )
        for _ in range(rounds)
    ]
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder), 1)
        saving = [seconds(lambda: checkpoints.save(state)) for _ in range(5)]
    return {
        "empty_round_ms": 1e3 * statistics.median(times),
        "packing_ms": 1e3 * statistics.median(packing),
        "checkpoint_ms": 1e3 * statistics.median(saving),
    }


def main() -> None:
    """Print the figures; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    options = parser.parse_args()
    torch.set_num_threads(1)
    setting = [f"task.model={options.model}", "task.adapter={lora: {rank: 8, alpha: 16}}"]
    paired = load("quickstart", [*setting, f"work.sgd.steps={options.steps}"])
    figures = step_ratios(paired, options.pairs) if options.pairs else {}
    for ending, targets in (("", "all_linear"), ("_q_v", "[q_proj, v_proj]")):
        idle = [*setting, "work.sgd.steps=0", f"task.adapter.lora.targets={targets}"]
        figures |= {f"{key}{ending}": value for key, value in empty_round(load("quickstart", idle), 20).items()}
    for name, value in figures.items():
        print(f"{name:20} {value:.4f}")
    print(json.dumps({"benchmark": "overhead", "pairs": options.pairs, **figures}))


if __name__ == "__main__":
    main()
