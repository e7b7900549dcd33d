"""From the settings of the benchmark of a round to the files that all its rows read."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import corpus
import shapes
from rows import Prepared
from torch import nn

from fedllm.models.base_models.load import load_base, materialise

LR, RANK, ALPHA = 1e-4, 8, 16  # the defaults of peers/batches.py, too


@dataclass(frozen=True)
class Facts:
    """What shares are made from. `parameters`: of the base model; `shapes`: (in, out) of its linear layers;
    `tokens`: of a client step, padding left out."""

    parameters: int
    shapes: frozenset[tuple[int, int]]
    tokens: float


def prepare(options: argparse.Namespace, folder: Path) -> tuple[Prepared, Facts]:
    """Write the experiment, the clients' records and the batches of each round.

    Raises:
        FedllmError: the records or the model cannot be had.
    """
    pairs = corpus.file_pairs(options.records, options.seed) if options.records else corpus.handbook_pairs(options.seed)
    if options.shape is not None:
        options.model = str(shapes.write(options.shape, folder / options.shape, options.device))
    base = load_base(options.model, dtype=options.dtype, device="cpu")
    num = options.clients * options.steps * options.batch
    choice = corpus.Choice(num, options.max_length, options.fill, options.template)
    chosen = corpus.chosen(pairs, base.tokenizer, choice)
    clients, experiment, batches = folder / "clients.jsonl", folder / "experiment.yaml", folder / "batches.jsonl"
    corpus.write_clients([pair for pair, _ in chosen], options.clients, clients)
    experiment.write_text(json.dumps(experiment_of(options, clients)), encoding="utf-8")
    corpus.write_batches(experiment, batches, base.tokenizer)
    tail = ("--batch", str(options.batch), "--max-length", str(options.max_length))
    linears = [layer for layer in base.model.modules() if isinstance(layer, nn.Linear)]
    facts = Facts(
        parameters=sum(leaf.numel() for leaf in base.model.parameters()),
        shapes=frozenset((layer.in_features, layer.out_features) for layer in linears),
        tokens=sum(tokens for _, tokens in chosen) / (options.clients * options.steps),
    )
    return Prepared(experiment, batches, materialise(base), tail, options.device, options.dtype, options.runs), facts


def experiment_of(options: argparse.Namespace, clients: Path) -> dict[str, Any]:
    """fedllm's experiment: the first round is warm-up, and nothing is held out or evaluated."""
    lora = {"rank": RANK, "alpha": ALPHA, "targets": "all_linear"}
    sgd = {"optimizer": "adamw", "lr": LR, "steps": options.steps, "batch_size": options.batch}
    task = {"model": options.model, "adapter": {"lora": lora}, "template": options.template}
    return {
        "task": {**task, "device": options.device, "dtype": options.dtype},
        "federation": {"shards": {"data": str(clients), "heldout": 0.0, "partition": {"by": "client"}}},
        "work": {"sgd": {**sgd, "max_length": options.max_length}},
        "method": "fedavg",
        "evaluation": {"metrics": []},
        "rounds": options.rounds + 1,
        "seed": options.seed,
    }
