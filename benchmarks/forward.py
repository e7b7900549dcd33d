"""Training without gradients: a client's peak memory over inference, a stack over one client after another, bytes.

Peaks are those of processes of their own: one that only looks at the loss of a batch, and ones that train on it (LoRA,
FedMeZO; all weights, FedKSeed, with the rebuilding of the weights before). Steps are timed in one process with one
thread, in turns, and the best of each counts. Bytes are those of a client's messages of a round in both directions;
FedKSeed's do not depend on the model, and are measured with `tiny-llama`, 4,096 seeds and 200 steps.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import fedllm
from fedllm.engines.process_memory import held_memory
from fedllm.engines.torch_threads import one_thread
from fedllm.events import Event, MessageSent
from fedllm.messages.context import RoundContext
from fedllm.models.adapters.lora import Lora
from fedllm.models.adapters.weights import Full
from fedllm.models.base_models.load import resolve_dtype
from fedllm.models.batch import Example, collate
from fedllm.models.loaded_model import LoadedModel, load
from fedllm.models.task import Task
from fedllm.rng import Key
from fedllm.tensors.directions import replayed
from fedllm.tensors.tree import Tree
from fedllm.training.base import ClientJob, run_work
from fedllm.training.zeroth_order import ZerothOrder

POOL, STEPS, SEEDS = 4096, 200, 3  # of FedKSeed's messages; of the weights that are rebuilt
KEY = Key(0)


def loaded(options: argparse.Namespace, adapter: str) -> tuple[LoadedModel, Tree]:
    """The model, and where its clients start."""
    chosen = Full() if adapter == "full" else Lora(rank=8, alpha=16)
    model = load(Task(options.model, adapter=chosen, device="cpu", dtype=options.dtype))
    return model, model.initial_params(KEY)


def job(client: str, start: Tree, options: argparse.Namespace) -> ClientJob:
    """A client with a batch of random tokens."""
    draw = torch.Generator().manual_seed(int(client))
    tokens = torch.randint(200, (options.batch_size, options.length), generator=draw)
    examples = [Example(row[:-1], row[1:]) for row in tokens]
    return ClientJob(RoundContext(0, KEY, options.clients, options.clients, client=client), start, examples)


def peak(options: argparse.Namespace) -> None:
    """In a process of its own: train for two steps, or look at a loss alone, and print the peak."""
    adapter, what = options.peak.split(":")
    model, start = loaded(options, adapter)
    one = job("1", start, options)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # from here on: loading needs more than both
    with one_thread():
        if what == "inference":
            with torch.no_grad():
                batch = collate([one.examples], (one.ctx.rng("dropout"),), recompute=False, share=False)
                model.losses({name: leaf.unsqueeze(0) for name, leaf in start.items()}, batch)
        else:
            pool = 64 if adapter == "full" else None
            if pool:
                amounts = torch.zeros(pool)
                amounts[:SEEDS] = 1e-6
                one = job("1", replayed(dict(start), amounts), options)
            run_work(ZerothOrder(lr=1e-6, steps=2, batch_size=options.batch_size, pool=pool), [one], model)
    print(held_memory()[1])


def peaks(options: argparse.Namespace) -> dict[str, float]:
    """Peak memory of each method, and over that of inference."""
    found: dict[str, float] = {}
    for adapter, method in (("lora", "fedmezo"), ("full", "fedkseed")):
        sizes = []
        for what in ("inference", "training"):
            command = [sys.executable, __file__, *sys.argv[1:], "--peak", f"{adapter}:{what}"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(done.stderr)
            sizes.append(int(done.stdout.splitlines()[-1]))
        found |= {f"{adapter}_inference_peak_bytes": sizes[0], f"{method}_peak_bytes": sizes[1]}
        found[f"{method}_over_inference"] = sizes[1] / sizes[0]
    return found


def speeds(options: argparse.Namespace) -> dict[str, float]:
    """Client steps a second of a stack, and of its clients one after another."""
    model, start = loaded(options, "lora")
    jobs = [job(str(k), start, options) for k in range(options.clients)]
    work = ZerothOrder(lr=1e-6, steps=options.steps, batch_size=options.batch_size)
    ways: dict[str, list[Sequence[ClientJob]]] = {"stacked": [jobs], "serial": [[one] for one in jobs]}
    best = dict.fromkeys(ways, float("inf"))
    with one_thread():
        run_work(ZerothOrder(steps=1, batch_size=options.batch_size), jobs, model)
        for _ in range(options.repeats):
            for name, stacks in ways.items():
                started = time.perf_counter()
                for stack in stacks:
                    run_work(work, stack, model)
                best[name] = min(best[name], time.perf_counter() - started)
    rates = {f"{name}_steps_per_s": options.clients * options.steps / seconds for name, seconds in best.items()}
    return {**rates, "stacked_over_serial": best["serial"] / best["stacked"]}


def sent(model: str, method: str, adapter: str, work: str) -> int:
    """Most bytes of a client's messages in a round."""
    told: list[Event] = []
    overrides = [f"task.model={model}", f"task.adapter={adapter}", f"method={method}", f"work={{zeroth_order: {work}}}",
                 "evaluation={metrics: []}", "rounds=2"]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        fedllm.run(fedllm.load("quickstart", overrides), engine="serial", out=Path(folder, "run"),
                   listeners=[told.append])  # fmt: skip
    sizes: dict[tuple[int, str], int] = {}
    for event in told:
        if isinstance(event, MessageSent) and event.call == "work":
            sizes[event.round, event.client] = sizes.get((event.round, event.client), 0) + event.bytes
    return max(sizes.values())


def main() -> None:
    """Print the figures; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", default="auto", help="default: what the processor is fast in")
    for name, value in (("clients", 8), ("steps", 2), ("batch-size", 1), ("length", 32), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--json", action="store_true", help="the line of JSON alone")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.dtype = str(resolve_dtype(options.dtype)).removeprefix("torch.")
    if options.peak:
        return peak(options)
    figures: dict[str, Any] = {**peaks(options), **speeds(options)}
    figures["fedmezo_bytes_a_round"] = sent(
        options.model, "fedmezo", "{lora: {rank: 8, alpha: 16}}", "{lr: 1e-6, steps: 1, batch_size: 1, max_length: 256}"
    )
    figures["fedkseed_bytes_a_round"] = sent(
        "tiny-llama", "fedkseed", "full", f"{{lr: 1e-6, steps: {STEPS}, batch_size: 1, max_length: 256, pool: {POOL}}}"
    )
    if not options.json:
        for name, value in figures.items():
            print(f"{name:30} {value}")
    print(json.dumps({"benchmark": "forward", "dtype": options.dtype, **figures}))


if __name__ == "__main__":
    main()
