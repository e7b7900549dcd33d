"""Large populations: clients per second, what a client costs besides its local training, and memory.

Each figure comes from a run of its own process on records that are made here: 10,000 clients of `--records` short
records, 100 a round, `tiny-llama`, one local step. A run without local steps gives the milliseconds a client that are
spent outside of local training: reading and encoding its records, packing both ways, events, the sum. They are medians
over rounds; on a machine with other work the best round and the processor time say more. The growth of peak memory is
that from a tenth of the clients to all of them, an evaluation of all clients included.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MOST_MS = 3.0  # outside of local training, a client
MOST_GROWTH_MB = 50.0
PROGRAM = """
import json, statistics, sys, time
import fedllm
from fedllm.events import RoundFinished, RoundStarted
overrides, engine, out = json.loads(sys.argv[1])
rounds, marks = [], []
def listen(event):
    if isinstance(event, RoundStarted):
        marks.append(time.process_time())
    if isinstance(event, RoundFinished):
        rounds.append(event)
        marks.append(time.process_time())
result = fedllm.run(fedllm.load("quickstart", overrides), engine=engine, out=out, listeners=[listen])
spent = [stop - start for start, stop in zip(marks[::2], marks[1::2])]
print(json.dumps({
    "seconds_a_client": statistics.median(event.seconds / event.clients for event in rounds[1:]),
    "best_a_client": min(event.seconds / event.clients for event in rounds[1:]),
    "cpu_a_client": statistics.median(cpu / event.clients for cpu, event in zip(spent[1:], rounds[1:])),
    "peak_rss_mb": result.summary["peak_rss_bytes"] / 1e6,
}))
"""


def write_records(path: Path, clients: int, records: int) -> Path:
    """`records` short questions for each client."""
    with path.open("w", encoding="utf-8") as file:
        for client in range(clients):
            for note in range(records):
                answer = f"It names {client * 7919 % 10007} and {note * 31 + client % 97}."
                record = {"user": f"user-{client:06}", "prompt": f"What does note {note} name?", "response": answer}
                file.write(json.dumps(record) + "\n")
    return path


def run(data: Path, engine: str, options: argparse.Namespace, *, steps: int, evaluated: bool) -> dict[str, float] | str:
    """The figures of one run in a process of its own, or why there are none."""
    shards = {
        "data": str(data),
        "heldout": 1 / options.records,
        "partition": {"by": "user"},
        "sampling": {"uniform": options.cohort},
    }
    overrides = [
        "task={model: tiny-llama, device: cpu, dtype: float32}",
        f"federation.shards={json.dumps(shards)}",
        f"work.sgd={{lr: 1e-2, steps: {steps}, batch_size: 2, max_length: 128}}",
        f"evaluation={{metrics: [{'nll' if evaluated else ''}]}}",
        f"rounds={options.rounds}",
    ]
    with tempfile.TemporaryDirectory() as folder:
        given = json.dumps([overrides, engine, str(Path(folder, "run"))])
        done = subprocess.run([sys.executable, "-c", PROGRAM, given], capture_output=True, text=True, check=False)
    lines = (done.stdout if done.returncode == 0 else done.stderr).splitlines()
    if done.returncode:
        return lines[-1] if lines else "no message"
    figures: dict[str, float] = json.loads(lines[-1])
    return figures


def measure(engine: str, few: Path, many: Path, options: argparse.Namespace) -> dict[str, Any] | str:
    """The figures of one engine, or why there are none."""
    small = run(few, engine, options, steps=1, evaluated=True)
    if isinstance(small, str):
        return small
    large = run(many, engine, options, steps=1, evaluated=True)
    idle = run(many, engine, options, steps=0, evaluated=False)
    if isinstance(large, str) or isinstance(idle, str):
        return str(large if isinstance(large, str) else idle)
    outside, growth = 1e3 * idle["seconds_a_client"], large["peak_rss_mb"] - small["peak_rss_mb"]
    return {
        "clients_per_second": 1 / large["seconds_a_client"],
        "outside_training_ms": outside,
        "outside_training_best_ms": 1e3 * idle["best_a_client"],
        "outside_training_cpu_ms": 1e3 * idle["cpu_a_client"],
        "outside_training_held": outside <= MOST_MS,
        "peak_rss_mb_tenth": small["peak_rss_mb"],
        "peak_rss_mb": large["peak_rss_mb"],
        "growth_mb": growth,
        "growth_held": growth <= MOST_GROWTH_MB,
    }


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", default="serial,batched", help="separated by commas")
    parser.add_argument("--clients", type=int, default=10_000)
    parser.add_argument("--cohort", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--records", type=int, default=8, help="of each client")
    return parser.parse_args(arguments)


def main() -> None:
    """Print the figures; the last line is JSON."""
    options, figures = parsed(), dict[str, Any]()
    with tempfile.TemporaryDirectory() as folder:
        few = write_records(Path(folder, "few.jsonl"), options.clients // 10, options.records)
        many = write_records(Path(folder, "many.jsonl"), options.clients, options.records)
        for engine in options.engines.split(","):
            found = measure(engine, few, many, options)
            if isinstance(found, str):
                print(f"{engine}: left out: {found}", flush=True)
                continue
            figures[engine] = found
            for name, value in found.items():
                print(f"{engine} {name:22} {value if isinstance(value, bool) else f'{value:.3f}'}", flush=True)
    settings = {"clients": options.clients, "cohort": options.cohort, "rounds": options.rounds}
    print(json.dumps({"benchmark": "population", **settings, "engines": figures}))


if __name__ == "__main__":
    main()
