"""Peak memory of SmolLM2 (or another model): of a serial run, and of 16 clients on the batched engine.

Each figure comes from a process of its own. The serial run has batches of 6 x 64 tokens; its bound is the base's
weights + the adapters + 1.2 GB, half of which is torch and transformers themselves. The 16 clients have 2 x 256 tokens;
their bound is 1.5 times

    one serial client + 16 adapters with AdamW's two states + workers x stack x the activations of one client,

where the activations are what a serial client takes at most beyond one without local steps.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from fedllm.models.base_models.load import resolve_dtype

ALLOWANCE = 1.2e9
FACTOR = 1.5
CLIENTS = 16
PROGRAM = """
import json, sys
import fedllm
from fedllm.events import EngineStarted
from fedllm.models.loaded_model import load
from fedllm.tensors.tree import num_bytes
overrides, engine, out = json.loads(sys.argv[1])
experiment, told = fedllm.load("quickstart", overrides), []
result = fedllm.run(experiment, engine=engine, out=out, listeners=[told.append])
base = load(experiment.task).base.model
started = [event for event in told if isinstance(event, EngineStarted)]
print(json.dumps({
    "peak_rss_bytes": result.summary["peak_rss_bytes"],
    "base_bytes": sum(p.numel() * p.element_size() for p in base.parameters()),
    "adapter_bytes": num_bytes(result.params),
    "heavy_modules": [name for name in ("datasets", "pandas", "plotly") if name in sys.modules],
    "side_by_side": max((event.workers * event.stack for event in started), default=1),
}))
"""


def measured(options: argparse.Namespace, engine: str, clients: int, work: str, repeats: int) -> dict[str, Any]:
    """The figures of a run in which each client has the same records of `repeats` times seven words."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "data.jsonl")
        text = "one two three four five six seven " * repeats
        rows = [json.dumps({"organisation": f"c{n:02}", "text": text}) + "\n" for n in range(clients)]
        data.write_text("".join(rows * 24), encoding="utf-8")
        overrides = [
            f"task.model={options.model}",
            f"task.dtype={options.dtype}",
            "task.objective=lm",
            f"federation.shards={{data: {data}, heldout: 0.0, partition: {{by: organisation}}}}",
            f"work.sgd={{optimizer: adamw, lr: 1e-3, {work}}}",
            "evaluation={metrics: []}",
            "rounds=2",
        ]
        arguments = json.dumps([overrides, engine, str(Path(folder, "run"))])
        done = subprocess.run([sys.executable, "-c", PROGRAM, arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def sixteen(options: argparse.Namespace) -> dict[str, float]:
    """The batched engine's peak beside its bound."""
    work = "steps: {steps}, batch_size: 2, max_length: 256"
    idle, one = (measured(options, "serial", 1, work.format(steps=steps), 48) for steps in (0, 3))
    many = measured(options, "batched", CLIENTS, work.format(steps=3), 48)
    activations = one["peak_rss_bytes"] - idle["peak_rss_bytes"]
    parts = one["peak_rss_bytes"] + 3 * CLIENTS * one["adapter_bytes"] + many["side_by_side"] * activations
    return {
        "batched_peak_rss_bytes": many["peak_rss_bytes"],
        "one_client_bytes": one["peak_rss_bytes"],
        "activation_bytes": activations,
        "batched_bound_bytes": FACTOR * parts,
        "batched_share_of_bound": many["peak_rss_bytes"] / (FACTOR * parts),
    }


def main() -> None:
    """Print the figures; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", default="auto", help="default: what the processor is fast in")
    options = parser.parse_args()
    options.dtype = str(resolve_dtype(options.dtype)).removeprefix("torch.")
    figures = measured(options, "serial", 1, "steps: 3, batch_size: 6, max_length: 64", 12)
    bound = figures["base_bytes"] + figures["adapter_bytes"] + ALLOWANCE
    figures |= {"bound_bytes": bound, "share_of_bound": figures["peak_rss_bytes"] / bound, **sixteen(options)}
    for name, value in figures.items():
        print(f"{name:24} {value}")
    print(json.dumps({"benchmark": "memory", "dtype": options.dtype, **figures}))


if __name__ == "__main__":
    main()
