"""Kill the processes of runs with a process for each client, at random moments, and compare what comes out.

    python -m tests.engines.site_kills FOLDER [SEEDS]

In each run a process is killed with SIGKILL every few seconds: a site's, one with a model, or the server's, which is
started again with `--resume`. Prints JSON: how many were killed, by kind, and in how many runs the adapters have other
bits than on the serial engine.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import fedllm
from tests.engines.test_sites import processes
from tests.runs.small import adapter_hash, spec, stateful, write_records

KINDS = ("model_worker", "site_process", "server")
NAMES = ("ann", "ben", "cid")
ROUNDS = 10


def main(folder: Path, seeds: int) -> dict[str, Any]:
    """One run a seed."""
    data = write_records(folder / "people.jsonl")
    asked = stateful(data, rounds=ROUNDS)
    whole = adapter_hash(fedllm.run(asked, engine="serial", out=folder / "serial").folder)
    file = folder / "spec.json"
    changes = {"stages": [{"scaffold": {}}, {"momentum": {"beta": 0.5}}, {"top_k": {"fraction": 0.3}}, "uniform"]}
    file.write_text(json.dumps(spec(data, rounds=ROUNDS, task__scope={"share": ["*lora_A"]}, **changes)))
    killed, other = Counter[str](), 0
    for seed in range(seeds):
        out = folder / f"run{seed}"
        killed.update(run_under_fire(file, out, random.Random(seed)))
        other += adapter_hash(out) != whole
    return {"runs": seeds, "killed": dict(killed), "other_bits": other}


def run_under_fire(file: Path, out: Path, chance: random.Random) -> Counter[str]:
    """Until the run has its summary."""
    killed = Counter[str]()
    command = [
        sys.executable,
        "-m",
        "fedllm.cli.main",
        "run",
        str(file),
        "--engine",
        "sites",
        "--out",
        str(out),
        "--resume",
    ]
    while not (out / "summary.json").is_file():
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until = time.monotonic() + 120
        while server.poll() is None and time.monotonic() < until:
            time.sleep(chance.uniform(3.0, 8.0))
            kind = chance.choices(KINDS, (4, 4, 1))[0]
            found = [server.pid] if kind == "server" else processes(kind, chance.choice(NAMES))
            begun = (out / "checkpoints").is_dir()
            if begun and found and server.poll() is None:
                os.kill(found[0], signal.SIGKILL)
                killed[kind] += 1
        server.kill()
        server.wait()
    return killed


if __name__ == "__main__":
    place = Path(sys.argv[1])
    place.mkdir(parents=True)
    print(json.dumps(main(place, int(sys.argv[2]) if len(sys.argv) > 2 else 5)))
