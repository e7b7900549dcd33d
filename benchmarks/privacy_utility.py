"""What differential privacy costs: loss on held-out records, by privacy level and by what trains, over several seeds.

Banking77 (`--data`, a folder with its train.jsonl.gz and test.jsonl.gz; records {"text": ..., "category": ...}) is
spread over 960 clients. About 60 of them take part in a round, by a coin of 1 / 16 each, or in turn (correlated noise).
Each takes one step. A cell is one run, and the loss of its model on test records that no client has. A cell is written
to `--out` as a line of JSON when it is done, so that a call that was stopped goes on; run folders are deleted.

A clip is about the length of an update of the first round without privacy, as a run on public data would show it. The
learning rate is, of those tried without privacy, one that learns and does not diverge; it is the same with privacy.
Figures are means over seeds, with the standard deviation behind. Which row is best is an observation about this task at
this size, and no claim.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cells import Cell, measure, shown

import fedllm
from fedllm.data.lazy_records import open_records
from fedllm.errors import nearest
from fedllm.evaluation.scores import Scorer
from fedllm.evaluation.settings import Evaluation
from fedllm.events import Event, PrivacySpent
from fedllm.experiment.config_file import override
from fedllm.experiment.record import Experiment
from fedllm.runs.loaded_run import open_run

CLIENTS, COHORT, ROUNDS, LENGTH = 960, 60, 6, 64
FIELDS = {"prompt": "text", "response": "category"}
TARGETS = ["q_proj", "v_proj"]


@dataclass(frozen=True)
class Adapter:
    """What trains. `clip`: of an update; `example_clip`: of the gradient of one example."""

    settings: Mapping[str, Any]
    lr: float
    clip: float
    example_clip: float
    scope: Mapping[str, Sequence[str]] | None = None
    stages: tuple[str, ...] = ()


LORA = {"lora": {"rank": 2, "alpha": 4, "targets": TARGETS}}
ADAPTERS = {
    "LoRA": Adapter(LORA, 0.15, 0.25, 1.6),
    "FFA-LoRA": Adapter(LORA, 0.6, 1.0, 1.6, {"freeze": ["*lora_A"]}),
    "Fed-SB": Adapter({"lora_xs": {"rank": 8, "alpha": 8, "targets": TARGETS}}, 0.15, 0.7, 4.7),
    "FedSVD": Adapter(LORA, 0.3, 0.5, 1.6, {"hold": ["*lora_A"]}, ("lora_svd",)),
}
LEVELS: Mapping[str, Mapping[str, Any]] = {
    "none": {},
    "client, epsilon 8": {"target": 8.0, "stage": "gaussian_dp"},
    "client, epsilon 2": {"target": 2.0, "stage": "gaussian_dp"},
    "client, epsilon 8, correlated noise": {"target": 8.0, "stage": "dp_ftrl"},
    "example, epsilon 8": {"target": 8.0, "work": "dp_sgd"},
}
# Correlated noise is taken back entry by entry, and FedSVD writes the entries in another basis after each round.
REFUSED = {("client, epsilon 8, correlated noise", "FedSVD")}


def experiment(cell: Cell, options: argparse.Namespace) -> Experiment:
    """The run of a cell. Scores are no part of it: the clients' records are private."""
    level, adapter = LEVELS[cell[0]], ADAPTERS[cell[1]]
    stages: list[Any] = [*adapter.stages, {"uniform": {"denominator": "expected"}}]
    work: dict[str, Any] = {"optimizer": "sgd", "lr": adapter.lr, "steps": 1, "batch_size": 2, "max_length": LENGTH}
    sampling: dict[str, Any] = {"poisson": COHORT / CLIENTS}
    if level.get("stage") == "gaussian_dp":
        stages.append({"gaussian_dp": {"clip": adapter.clip}})
    elif level.get("stage") == "dp_ftrl":
        stages.append({"dp_ftrl": {"clip": adapter.clip, "separation": CLIENTS // COHORT}})
        sampling = {"rotation": COHORT}
    spec: dict[str, Any] = {
        "task": {"model": "smollm2-135m-instruct", "adapter": adapter.settings},
        "federation": {
            "shards": {"data": str(options.data / "train.jsonl.gz"), "fields": FIELDS, "clients": CLIENTS,
                       "partition": "iid", "heldout": 0.0, "sampling": sampling}
        },
        "work": {"sgd": work},
        "stages": stages,
        "evaluation": {"metrics": [], "diagnostics": None},
        "limits": {"keep_last": 1, "checkpoint_every": ROUNDS},
        "rounds": ROUNDS,
        "seed": cell[2],
    }  # fmt: skip
    if adapter.scope:
        spec["task"]["scope"] = adapter.scope
    if "work" in level:
        spec["work"] = {level["work"]: {**work, "clip": adapter.example_clip}}
    if "target" in level:
        unit = "example" if "work" in level else "client"
        spec["demands"] = {"privacy": {"unit": unit, "target_epsilon": level["target"]}}
    return override(fedllm.build(spec), options.set)


def measured(cell: Cell, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of one run."""
    spent: list[PrivacySpent] = []

    def note(event: Event) -> None:
        if isinstance(event, PrivacySpent):
            spent.append(event)

    out = options.out / "run"
    shutil.rmtree(out, ignore_errors=True)
    summary = fedllm.run(experiment(cell, options), out=out, listeners=[note]).summary
    base, after = losses(out, options)
    shutil.rmtree(out)
    ratios = [event.signal_to_noise for event in spent if event.signal_to_noise is not None]
    return {
        "level": cell[0],
        "adapter": cell[1],
        "seed": cell[2],
        "base": base,
        "nll": after,
        "epsilon": summary["epsilon"],
        "noise_multiplier": spent[-1].noise_multiplier if spent else None,
        "signal_to_noise": statistics.fmean(ratios) if ratios else None,
        "seconds": summary["seconds"],
    }


def losses(folder: Path, options: argparse.Namespace) -> tuple[float, float]:
    """Loss per token on the test records, of the model that the run began with and of its result."""
    opened = open_run(folder)
    records = open_records(str(options.data / "test.jsonl.gz"), fields=FIELDS)
    apart = max(1, len(records) // options.records)  # they are sorted by category
    scorer = Scorer(Evaluation(batch_size=64), LENGTH)
    chosen = [records[place] for place in range(0, len(records), apart)][: options.records]
    start = {**opened.params, **opened.model.initial_params(opened.experiment.key)}
    base, after = (
        scorer.figures(scorer.sums(opened.model, params, chosen))["nll"] for params in (start, opened.params)
    )
    return base, after


def markdown(found: Sequence[Mapping[str, Any]]) -> str:
    """The table: a line a level, a column an adapter."""
    seeds = max((len({one["seed"] for one in found if one["level"] == level}) for level in LEVELS), default=0)
    lines = [f"| privacy ({seeds} seeds) | {' | '.join(ADAPTERS)} |", "| --- " * (1 + len(ADAPTERS)) + "|"]
    base = [one["base"] for one in found]
    if base:
        lines.append(f"| the model before | {' | '.join([f'{statistics.fmean(base):.3f}'] * len(ADAPTERS))} |")
    for level in LEVELS:
        own = [
            [one["nll"] for one in found if (one["level"], one["adapter"]) == (level, adapter)] for adapter in ADAPTERS
        ]
        if any(own):
            lines.append(f"| {level} | {' | '.join(map(shown, own))} |")
    return "\n".join(lines)


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options.

    Raises:
        SystemExit: there is no such level or adapter.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.jsonl.gz and test.jsonl.gz")
    parser.add_argument("--out", type=Path, required=True, help="folder of what is measured")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--levels", nargs="+", default=list(LEVELS), help="default: all")
    parser.add_argument("--adapters", nargs="+", default=list(ADAPTERS), help="default: all")
    parser.add_argument("--records", type=int, default=256, help="test records")
    parser.add_argument("--most", type=int, help="cells to measure in this call")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="overrides of every run")
    options = parser.parse_args(arguments)
    for given, known in ((options.levels, LEVELS), (options.adapters, ADAPTERS)):
        for name in given:
            if name not in known:
                parser.error(f"there is no '{name}'{nearest(name, known)}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is missing; print the table, and JSON in the last line."""
    options = parsed(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    every = itertools.product(options.seeds, options.levels, options.adapters)
    cells = [(level, adapter, seed) for seed, level, adapter in every if (level, adapter) not in REFUSED]
    path, keys = options.out / "privacy_utility.jsonl", ("level", "adapter", "seed")
    found, failed = measure(
        path, cells, keys, lambda cell: measured(cell, options),
        most=options.most, told="nll {base:.3f} to {nll:.3f}, {seconds:.0f} s",
    )  # fmt: skip
    print(markdown(found))
    print(json.dumps({"benchmark": "privacy_utility", "rows": found, "failed": failed}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
