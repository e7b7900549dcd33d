"""Tables of methods on one task: quality, aggregation bias, bytes and seconds, over several seeds.

    --table aggregation   ways to average LoRA of one rank
    --table ranks         ways to bring LoRAs of rank 4, 8 and 16 together, between the smallest and the largest alone
    --table tuning        what trains: LoRA, prefix, bottleneck adapters, norms, soft prompt, all weights

A cell is one run of a packaged recipe with the settings of its row. Each is written to `--out` as a line of JSON when
it is done, so that a call that was stopped goes on; run folders are deleted. Figures are means over seeds, with the
standard deviation behind. Which row wins is an observation about this task, and no claim.

`--data` takes any file that fedllm reads, split by `--by` with a Dirichlet distribution of 0.3 among `--clients`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fedllm
from fedllm.errors import FedllmError, nearest
from fedllm.events import Diagnosed, Event, RunStarted

LORA = {name: [f"method={name}"] for name in ("fedit", "ffa_lora", "rolora", "fedsa_lora", "lora_fair", "fedsvd")}
LORA |= {name: [f"method={name}"] for name in ("flexlora", "raflora", "flora", "fedex_lora", "federa")}
LORA["federa"] = ["method=federa", "work.sgd.lr=1e-3"]  # its factors are large from the start
LORA["fed_sb"] = ["method=fed_sb", "task.adapter={lora_xs: {rank: 32, alpha: 32}}"]
LORA["slora"] = ["method={slora: {rounds: 3}}", "task.adapter={sparse_lora: {rank: 8, alpha: 16}}"]
UNEQUAL = ("zero_padding", "rbla", "flexlora", "raflora", "flora", "hetlora")
NARROW = "federation.shards.devices={phone: {rank: 4, bandwidth: 2500000}, laptop: {rank: 8, bandwidth: 5000000}}"
ALIKE = "federation.shards.profiles={}"


@dataclass(frozen=True)
class Table:
    """`rows`: for each name the overrides of the recipe. `columns`: heads of the printed table."""

    recipe: str
    rows: Mapping[str, Sequence[str]]
    columns: tuple[str, ...]


TABLES = {
    "aggregation": Table("lora-aggregation", LORA, ("nll", "exact_match", "bias", "mib_up", "mib_down", "seconds")),
    "ranks": Table(
        "lora-ranks",
        {
            "fedit, rank 4": ["method=fedit", ALIKE, "task.adapter.lora={rank: 4, alpha: 8}"],
            **{name: [f"method={name}"] for name in UNEQUAL},
            "haflq": ["method=haflq", NARROW],
            "fedit, rank 16": ["method=fedit", ALIKE],
        },
        ("nll", "exact_match", "bias", "mib_up", "mib_down", "seconds"),
    ),
    "tuning": Table(
        "full-vs-lora",
        {
            "lora": [],
            "prefix": ["task.adapter=prefix", "work.sgd.lr=1e-1"],
            "bottleneck": ["task.adapter=bottleneck"],
            "norms": ["task.adapter=norms", "work.sgd.lr=1e-2"],
            "soft_prompt": ["task.adapter=soft_prompt", "work.sgd.lr=1e-2"],
            "full": ["method=full", "work.sgd.lr=2e-4"],
        },
        ("trainable", "nll", "exact_match", "mib_up", "mib_down", "seconds"),
    ),
}
ROUNDED = {"nll": 3, "exact_match": 3, "bias": 3, "mib_up": 1, "mib_down": 1, "seconds": 0}


def measured(table: Table, row: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of one run."""
    facts: dict[str, Any] = {"trainable": None}
    biases: list[float] = []

    def note(event: Event) -> None:
        if isinstance(event, RunStarted):
            facts["trainable"] = event.trainable
        if isinstance(event, Diagnosed) and event.bias is not None:
            biases.append(event.bias)

    out = options.out / "run"
    shutil.rmtree(out, ignore_errors=True)
    experiment = fedllm.load(table.recipe, [*table.rows[row], *data_of(options), *options.set, f"seed={seed}"])
    summary = fedllm.run(experiment, out=out, listeners=[note]).summary
    shutil.rmtree(out)
    return {
        "row": row,
        "seed": seed,
        **facts,
        **summary["eval"]["federated"],
        "bias": statistics.fmean(biases) if biases else None,
        "mib_up": summary["bytes_up"] / 2**20,
        "mib_down": summary["bytes_down"] / 2**20,
        "seconds": summary["seconds_per_round"] * summary["rounds"],
    }


def data_of(options: argparse.Namespace) -> list[str]:
    """Overrides for data of one's own."""
    if options.data is None:
        return []
    split = f"{{dirichlet: {{alpha: 0.3, by: {options.by}}}}}"
    shards = f"{{data: {options.data}, heldout: 0.1, clients: {options.clients}, split: {split}}}"
    return [f"federation.shards={shards}", "evaluation.by=null"]


def rows_of(path: Path) -> list[dict[str, Any]]:
    """What earlier calls have measured."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


def markdown(table: Table, found: Sequence[Mapping[str, Any]]) -> str:
    """The table, a line a row."""
    lines = [f"| method | {' | '.join(table.columns)} |", f"| --- {'| --- ' * len(table.columns)}|"]
    for row in table.rows:
        own = [figures for figures in found if figures["row"] == row]
        cells = [cell(name, [one.get(name) for one in own]) for name in table.columns]
        if own:
            lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(name: str, values: Sequence[float | None]) -> str:
    """Mean and standard deviation."""
    known, digits = [value for value in values if value is not None], ROUNDED.get(name, 0)
    if not known:
        return "-"
    mean = f"{statistics.fmean(known):,.{digits}f}"
    spread = statistics.stdev(known) if len(known) > 1 else 0.0
    return f"{mean} ± {spread:.{digits}f}" if spread >= 0.5 * 10**-digits else mean


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options.

    Raises:
        SystemExit: there is no such row.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", choices=TABLES, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of what is measured")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", default=[], help="default: all")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="overrides of every run")
    parser.add_argument("--data", help="records of your own")
    parser.add_argument("--by", default="category", help="their field that the split goes by")
    parser.add_argument("--clients", type=int, default=8)
    options = parser.parse_args(arguments)
    known = TABLES[options.table].rows
    for row in options.rows:
        if row not in known:
            parser.error(f"there is no row '{row}'{nearest(row, known)}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is missing; print the table, and JSON in the last line."""
    options = parsed(arguments)
    table = TABLES[options.table]
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{options.table}.jsonl"
    found, failed = rows_of(path), dict[str, str]()
    for seed in options.seeds:
        for row in options.rows or table.rows:
            if any((one["row"], one["seed"]) == (row, seed) for one in found) or row in failed:
                continue
            try:
                found.append(measured(table, row, seed, options))
            except FedllmError as error:
                failed[row] = str(error)
                print(f"{row}: left out: {error}", file=sys.stderr, flush=True)
                continue
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(found[-1]) + "\n")
            told = f"{row}, seed {seed}: nll {found[-1]['nll']:.3f}, {found[-1]['seconds']:.0f} s"
            print(told, file=sys.stderr, flush=True)
    print(markdown(table, found))
    print(json.dumps({"benchmark": "tables", "table": options.table, "rows": found, "failed": failed}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
