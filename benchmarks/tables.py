"""Tables of methods on one task: quality, aggregation bias, bytes and seconds, over several seeds.

    --table aggregation   ways to average LoRA of one rank
    --table ranks         ways to bring LoRAs of rank 4, 8 and 16 together, between the smallest and the largest alone
    --table tuning        what trains: LoRA, prefix, bottleneck adapters, norms, soft prompt, all weights
    --table skew          ways to average LoRA of one rank on equal, unequal and very unequal clients
    --table ten-ranks     ten clients of ranks 64, 32, 16, 16, 8, 8, 4, 4, 4, 4 (FLoRA, arXiv 2409.05976, section 4.1)

The last two take Banking77 or a file like it (`--data`, see the recipe `intents`). A cell is one run of a packaged
recipe with the settings of its row. Each is written to `--out` as a line of JSON when it is done, so that a call that
was stopped goes on; run folders are deleted. Figures are means over seeds, with the standard deviation behind. Which
row wins is an observation about this task, and no claim.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
SKEWED = ("fedit", "ffa_lora", "rolora", "flora", "fedex_lora", "flexlora", "fedsa_lora", "fed_sb")
WIDEST = "task.adapter.lora={rank: 64, alpha: 128}"
TEN = (64, 32, 16, 16, 8, 8, 4, 4, 4, 4)
PROFILES = ", ".join(f"client-{number:03}: {{rank: {rank}}}" for number, rank in enumerate(TEN))
TEN_RANKS = ["federation.shards.clients=10", f"federation.shards.profiles={{{PROFILES}}}"]
DIRICHLET = "federation.shards.partition={{dirichlet: {{alpha: {alpha}, by: category, min_size: 16}}}}"
PARTITIONS = {
    "iid": ["federation.shards.partition=iid"],
    **{f"Dirichlet {a}": [DIRICHLET.format(alpha=a)] for a in ("1.0", "0.1")},
}
FULL = ["rounds=30", "work.sgd.steps=4", "evaluation.limit=null"]


Cell = tuple[str, str, int]
"""A row, a partition and a seed."""


@dataclass(frozen=True)
class Table:
    """What is run, and shown.

    Args:
        rows: name to overrides of the recipe.
        columns: heads of the printed table.
        partitions: name to overrides; every row is run on each.
    """

    recipe: str
    rows: Mapping[str, Sequence[str]]
    columns: tuple[str, ...]
    partitions: Mapping[str, Sequence[str]] = field(default_factory=lambda: {"": []})


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
    "skew": Table(
        "intents",
        {name: LORA[name] for name in SKEWED},
        ("nll", "bias", "mib_up", "mib_down", "seconds"),
        PARTITIONS,
    ),
    "ten-ranks": Table(
        "intents",
        {
            name: [f"method={name}", WIDEST, *TEN_RANKS]
            for name in ("flora", "flexlora", "hetlora", "raflora", "zero_padding")
        },
        ("nll", "bias", "mib_up", "mib_down", "seconds"),
    ),
}
ROUNDED = {"nll": 3, "exact_match": 3, "bias": 3, "mib_up": 1, "mib_down": 1, "seconds": 0}


def measured(table: Table, cell: Cell, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of one run."""
    row, partition, seed = cell
    facts: dict[str, Any] = {"trainable": None}
    biases: list[float] = []

    def note(event: Event) -> None:
        if isinstance(event, RunStarted):
            facts["trainable"] = event.trainable
        if isinstance(event, Diagnosed) and event.bias is not None:
            biases.append(event.bias)

    out = options.out / "run"
    shutil.rmtree(out, ignore_errors=True)
    experiment = fedllm.load(
        table.recipe, [*table.rows[row], *table.partitions[partition], *options.set, f"seed={seed}"]
    )
    summary = fedllm.run(experiment, out=out, listeners=[note]).summary
    shutil.rmtree(out)
    return {
        "row": row,
        "partition": partition,
        "seed": seed,
        **facts,
        **summary["eval"]["federated"],
        "bias": statistics.fmean(biases) if biases else None,
        "mib_up": summary["bytes_up"] / 2**20,
        "mib_down": summary["bytes_down"] / 2**20,
        "seconds": summary["seconds_per_round"] * summary["rounds"],
    }


def rows_of(path: Path) -> list[dict[str, Any]]:
    """What earlier calls have measured."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


def markdown(table: Table, found: Sequence[Mapping[str, Any]]) -> str:
    """The table, a line a row and partition."""
    heads = ["method", *(["partition"] if len(table.partitions) > 1 else []), *table.columns]
    lines = [f"| {' | '.join(heads)} |", f"| {' | '.join('---' for _ in heads)} |"]
    for partition in table.partitions:
        for row in table.rows:
            own = [one for one in found if one["row"] == row and one.get("partition", "") == partition]
            names = [row, partition][: len(heads) - len(table.columns)]
            cells = [shown(name, [one.get(name) for one in own]) for name in table.columns]
            if own:
                lines.append(f"| {' | '.join([*names, *cells])} |")
    return "\n".join(lines)


def shown(name: str, values: Sequence[float | None]) -> str:
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
    parser.add_argument("--data", help="records for the recipe, as in --set federation.shards.data=FILE")
    parser.add_argument(
        "--full", action="store_true", help="skew and ten-ranks: 30 rounds of 4 steps, all of what is held out"
    )
    options = parser.parse_args(arguments)
    known = TABLES[options.table].rows
    for row in options.rows:
        if row not in known:
            parser.error(f"there is no row '{row}'{nearest(row, known)}")
    if options.data is None and TABLES[options.table].recipe == "intents":
        parser.error(f"--table {options.table} takes --data FILE, such as Banking77's train.jsonl.gz")
    own = [] if options.data is None else [f"federation.shards.data={options.data}"]
    options.set = [*own, *(FULL if options.full else []), *options.set]
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is missing; print the table, and JSON in the last line."""
    options = parsed(arguments)
    table = TABLES[options.table]
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{options.table}.jsonl"
    found, failed = rows_of(path), dict[str, str]()
    done = {(one["row"], one.get("partition", ""), one["seed"]) for one in found}
    for seed, partition, row in itertools.product(options.seeds, table.partitions, options.rows or table.rows):
        if (row, partition, seed) in done or row in failed:
            continue
        try:
            found.append(measured(table, (row, partition, seed), options))
        except FedllmError as error:
            failed[row] = str(error)
            print(f"{row}: left out: {error}", file=sys.stderr, flush=True)
            continue
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(found[-1]) + "\n")
        told = f"{row}, {partition or 'seed'} {seed}: nll {found[-1]['nll']:.3f}, {found[-1]['seconds']:.0f} s"
        print(told, file=sys.stderr, flush=True)
    print(markdown(table, found))
    print(json.dumps({"benchmark": "tables", "table": options.table, "rows": found, "failed": failed}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
