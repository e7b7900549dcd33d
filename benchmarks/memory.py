"""Peak memory of a serial run: SmolLM2 (or another model), batches of 6 x 64 tokens, in a process of its own.

The bound is the base's weights + the adapters + 1.2 GB, half of which is torch and transformers themselves.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ALLOWANCE = 1.2e9
PROGRAM = """
import json, sys
import fedllm
from fedllm.tasks.model import load
from fedllm.tree import num_bytes
experiment = fedllm.load("quickstart", json.loads(sys.argv[1]))
result = fedllm.run(experiment, engine="serial", out=sys.argv[2])
base = load(experiment.task).base.model
weights = sum(p.numel() * p.element_size() for p in base.parameters())
print(json.dumps({
    "peak_rss_bytes": result.summary["peak_rss_bytes"],
    "base_bytes": weights,
    "adapter_bytes": num_bytes(result.params),
    "heavy_modules": [name for name in ("datasets", "pandas", "plotly") if name in sys.modules],
}))
"""


def main() -> None:
    """Print the figures; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        lines = [json.dumps({"organisation": "a", "text": "one two three four five six seven " * 12})] * 24
        data = Path(folder, "data.jsonl")
        data.write_text("\n".join(lines) + "\n", encoding="utf-8")
        overrides = [
            f"task.model={options.model}",
            f"task.dtype={options.dtype}",
            "task.objective=lm",
            f"federation.shards={{data: {data}, heldout: 0.0, split: {{by: organisation}}}}",
            "work.sgd={optimizer: adamw, lr: 1e-3, steps: 3, batch_size: 6, max_length: 64}",
            "evaluation={metrics: [nll]}",
            "rounds=2",
        ]
        command = [sys.executable, "-c", PROGRAM, json.dumps(overrides), str(Path(folder, "run"))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr)
    figures = json.loads(done.stdout.splitlines()[-1])
    bound = figures["base_bytes"] + figures["adapter_bytes"] + ALLOWANCE
    figures |= {"bound_bytes": bound, "share_of_bound": figures["peak_rss_bytes"] / bound}
    for name, value in figures.items():
        print(f"{name:20} {value}")
    print(json.dumps({"benchmark": "memory", "dtype": options.dtype, **figures}))


if __name__ == "__main__":
    main()
