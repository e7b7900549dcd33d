"""Methods that give each client its own model, beside each client alone and one model for all, over several seeds.

Clients are as the data has them: the speakers of tinyshakespeare and the subjects of medmcqa with the most records, and
the four organisations of the handbook. A cell is one method on one data set with one seed. It is written to `--out` as
a line of JSON when it is done, so that a call that was stopped goes on; run folders are deleted.

All cells of a data set take the same steps of the same optimiser at the same learning rate; a method that needs two
passes over the data takes more time, which the table has. Figures are losses per token on held-out records, means over
the clients and then over the seeds, with the standard deviation over the seeds behind. Which row is best is an
observation about these data at this size, and no claim.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from cells import Cell, measure, shown

import fedllm
from fedllm.data.records import rows_of
from fedllm.errors import nearest
from fedllm.experiment.config_file import override
from fedllm.experiment.methods import METHODS
from fedllm.experiment.record import Experiment
from fedllm.models.loaded_model import load
from fedllm.report.fairness import spread
from fedllm.runs.baselines import Baselines

ALONE, SHARED = "local_only", "fedit"
WANTED = (
    *(ALONE, SHARED, "fedsa_lora", "feddpa_f", "feddpa_t", "fdlora", "fedalt", "ditto", "c2a", "fedamole", "ifca"),
)
ROWS = tuple(name for name in WANTED if name == ALONE or name in METHODS)
CLIENTS, MOST = 4, 120  # clients, and records of each at most
HEAD = ("own", "others'", "all", "worst client", "std", "better than alone", "than FedIT", "MiB up", "seconds")


@dataclass(frozen=True)
class Data:
    """A data set. `file`: below `--data`; None: packaged. `key`: the field that names the client."""

    key: str
    file: str | None = None
    objective: str = "sft"
    lr: float = 2e-3


DATA: Mapping[str, Data] = {
    "handbook": Data("organisation"),
    "tinyshakespeare": Data("speaker", "tinyshakespeare/speeches.jsonl.gz", objective="lm"),
    "medmcqa": Data("subject", "medmcqa/validation.jsonl.gz"),
}


def records(name: str, options: argparse.Namespace) -> Path:
    """The records of the clients that have the most, written once: the first MOST of each, in their order."""
    data = DATA[name]
    path: Path = options.out / f"{name}.jsonl"
    if not path.exists():
        rows = [row for _, row in rows_of(str(options.data / str(data.file)))]
        chosen = {client for client, _ in Counter(row[data.key] for row in rows).most_common(options.clients)}
        seen: Counter[str] = Counter()
        kept = []
        for row in rows:
            seen[row[data.key]] += 1
            if row[data.key] in chosen and seen[row[data.key]] <= MOST:
                kept.append(json.dumps(answered(row)) + "\n")
        path.write_text("".join(kept), encoding="utf-8")
    return path


def answered(row: Mapping[str, Any]) -> dict[str, Any]:
    """A multiple choice as its question and the right choice in words; any other record as it is."""
    if "choices" not in row:
        return dict(row)
    right = row["choices"][ord(row["answer"]) - ord("A")]
    return {"subject": row["subject"], "prompt": row["question"], "response": right}


def experiment(cell: Cell, options: argparse.Namespace) -> Experiment:
    """The run of a cell."""
    name, method, seed = cell
    data = DATA[name]
    shards: dict[str, Any] = {"partition": {"by": data.key}}
    if data.file is None:
        shards |= {"data": name, "heldout": f"{name}-test"}
    else:
        shards |= {"data": str(records(name, options)), "heldout": 0.2}
    kind = METHODS[_run(method)].adapter or "lora"
    spec: dict[str, Any] = {
        "task": {"model": "smollm2-135m-instruct", "objective": data.objective,
                 "adapter": {kind: {"rank": 8, "alpha": 16, "targets": "all_linear"}}},
        "federation": {"shards": shards},
        "work": {"sgd": {"optimizer": "adamw", "lr": data.lr, "steps": 2, "batch_size": 6, "max_length": 64}},
        "method": _run(method),
        "evaluation": {"metrics": ["nll"], "limit": 24, "batch_size": 24, "diagnostics": None, "personal": {}},
        "limits": {"keep_last": 1, "checkpoint_every": options.rounds},
        "rounds": options.rounds,
        "seed": seed,
    }  # fmt: skip
    return override(fedllm.build(spec), options.set)


def _run(method: str) -> str:
    """Each client alone takes the adapter of the method that shares everything."""
    return SHARED if method == ALONE else method


def measured(cell: Cell, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of one cell; `clients`: each client's model on its own records."""
    made = experiment(cell, options)
    found = _alone(made) if cell[1] == ALONE else _together(made, options)
    own = spread("nll", found["clients"])
    return {"data": cell[0], "method": cell[1], "seed": cell[2], "own": own["mean"], "worst": own["worst"],
            "std": own["std"], **found}  # fmt: skip


def _alone(made: Experiment) -> dict[str, Any]:
    """Each client by itself, which sends nothing."""
    baselines = Baselines(made, load(made.task), made.federation.load(made.key), lambda event: None)
    with empty_cache():
        began = perf_counter()
        event = baselines.local_only()
    clients = {client: scores["own/nll"] for client, scores in event.clients.items()}
    return {"clients": clients, "others": None, "all": event.metrics["nll"], "bytes_up": 0,
            "seconds": round(perf_counter() - began, 2)}  # fmt: skip


@contextmanager
def empty_cache() -> Iterator[None]:
    """Without the baselines that were trained before: they would take no time."""
    before = os.environ.get("FEDLLM_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FEDLLM_CACHE"] = folder
        try:
            yield
        finally:
            del os.environ["FEDLLM_CACHE"]
            os.environ.update({} if before is None else {"FEDLLM_CACHE": before})


def _together(made: Experiment, options: argparse.Namespace) -> dict[str, Any]:
    out = options.out / "run"
    shutil.rmtree(out, ignore_errors=True)
    summary = fedllm.run(made, out=out).summary
    shutil.rmtree(out)
    told = summary["personal"]["metrics"]["nll"]
    clients = {client: scores["own"]["nll"] for client, scores in summary["personal"]["clients"].items()}
    return {"clients": clients, "others": told["others"], "all": told["all"], "bytes_up": summary["bytes_up"],
            "seconds": summary["seconds"]}  # fmt: skip


def better(found: Sequence[Mapping[str, Any]], row: Mapping[str, Any], than: str) -> float | None:
    """The share of the clients with a lower loss on their own records than in another row of the same data and seed."""
    others = [one for one in found if (one["data"], one["method"], one["seed"]) == (row["data"], than, row["seed"])]
    if not others or row["method"] == than:
        return None
    theirs: Mapping[str, float] = others[0]["clients"]
    own: Mapping[str, float] = row["clients"]
    return sum(value < theirs[client] for client, value in own.items()) / len(own)


def markdown(found: Sequence[Mapping[str, Any]]) -> str:
    """A table for each data set: a line a method."""
    made = []
    for name in DATA:
        here = [one for one in found if one["data"] == name]
        if not here:
            continue
        seeds = len({one["seed"] for one in here})
        head = (
            "own | others' | all | worst client | std over clients | better than alone | than FedIT | MiB up | seconds"
        )
        lines = [f"| {name} ({seeds} seeds) | {head} |", "| --- " * 10 + "|"]
        for method in WANTED:
            rows = [one for one in here if one["method"] == method]
            if rows:
                losses = [shown([one[key] for one in rows]) for key in ("own", "others", "all", "worst", "std")]
                shares = [shown([better(found, one, than) for one in rows], 2) for than in (ALONE, SHARED)]
                sent = shown([one["bytes_up"] / 2**20 for one in rows], 1)
                seconds = shown([one["seconds"] for one in rows], 0)
                lines.append(f"| {method} | {' | '.join([*losses, *shares, sent, seconds])} |")
        made.append("\n".join(lines))
    return "\n\n".join(made)


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options.

    Raises:
        SystemExit: there is no such method or data set, or no folder was named for one that needs it.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of what is measured")
    parser.add_argument("--data", type=Path, help="folder with tinyshakespeare and medmcqa")
    parser.add_argument("--sets", nargs="+", default=list(DATA), help="data sets; default: all")
    parser.add_argument("--methods", nargs="+", default=list(ROWS), help="default: all that there are")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--clients", type=int, default=CLIENTS, help="of tinyshakespeare and medmcqa")
    parser.add_argument("--most", type=int, help="cells to measure in this call")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="overrides of every run")
    options = parser.parse_args(arguments)
    for given, known in ((options.sets, DATA), (options.methods, ROWS)):
        for name in given:
            if name not in known:
                parser.error(f"there is no '{name}'{nearest(name, known)}")
    if options.data is None and any(DATA[name].file for name in options.sets):
        parser.error("tinyshakespeare and medmcqa need --data, the folder that holds them; or give --sets handbook")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is missing; print the tables, and JSON in the last line."""
    options = parsed(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    every = itertools.product(options.seeds, options.sets, options.methods)
    cells = [(name, method, seed) for seed, name, method in every]
    found, failed = measure(
        options.out / "personal.jsonl", cells, ("data", "method", "seed"), lambda cell: measured(cell, options),
        most=options.most, told="own nll {own:.3f}, {seconds:.0f} s",
    )  # fmt: skip
    print(markdown(found))
    print(json.dumps({"benchmark": "personal", "rows": found, "failed": failed}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
