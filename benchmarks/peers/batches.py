"""What every peer script shares: its arguments, the batches that it takes, and the line that it prints.

Each line of the file of batches holds `round`, `client`, `prompt` and `completion`; lines stand in the order in which a
client takes them. Round 0 is warm-up. Nothing but the standard library is imported here.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Row = dict[str, str]


@dataclass(frozen=True)
class Batches:
    """The rows of each round and client, in order."""

    rows: dict[int, dict[str, list[Row]]]
    batch: int

    @property
    def rounds(self) -> int:
        """Rounds, warm-up included."""
        return len(self.rows)

    @property
    def clients(self) -> list[str]:
        """All clients; each takes part in every round."""
        return list(self.rows[0])

    @property
    def client_steps(self) -> int:
        """Local steps of one round, all clients together."""
        return sum(len(rows) // self.batch for rows in self.rows[0].values())


def arguments(about: str | None) -> argparse.ArgumentParser:
    """The settings that all peers know."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("model", help="a folder in transformers' layout")
    parser.add_argument("batches", type=Path, help="JSON lines with round, client, prompt and completion")
    parser.add_argument("--batch", type=int, default=2, help="sequences a step")
    parser.add_argument("--max-length", type=int, default=256, help="tokens a sequence; what is longer is cut")
    parser.add_argument("--dtype", required=True, choices=("float32", "bfloat16"))
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--alpha", type=float, default=16)
    return parser


def read(path: Path, batch: int) -> Batches:
    """The file of batches."""
    found: dict[int, dict[str, list[Row]]] = {}
    with path.open(encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            own = found.setdefault(row["round"], {}).setdefault(row["client"], [])
            own.append({"prompt": row["prompt"], "completion": row["completion"]})
    return Batches(found, batch)


def timed(batches: Batches, one_round: Callable[[int], int]) -> None:
    """Run all rounds and print one JSON line about all but the first. `one_round` returns its number of tokens."""
    seconds, tokens = [], []
    for place in range(batches.rounds):
        started = time.perf_counter()
        tokens.append(one_round(place))
        seconds.append(time.perf_counter() - started)
    figures = {
        "round_s": [round(value, 4) for value in seconds[1:]],
        "client_steps_per_s": batches.client_steps / min(seconds[1:]),
        "real_tokens_per_step": sum(tokens[1:]) / len(tokens[1:]) / batches.client_steps,
    }
    print(json.dumps(figures), flush=True)
