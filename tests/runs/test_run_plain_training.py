"""One client, one round, full weights: what plain training on that client's records gives."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

import fedllm
from tests.runs.small import small

RECORDS = [
    {"prompt": "What is seven times six?", "response": "42"},
    {"prompt": "Capital of France?", "response": "Paris, on the Seine"},
    {"prompt": "Hi", "response": "Hello there"},
]
STEPS = 3
Optimizers = Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer]


def trained(dtype: torch.dtype, optimizer: Optimizers) -> dict[str, torch.Tensor]:
    """A textbook loop: whole batch, loss on the answer's tokens, the mean per record and then over records."""
    from fedllm.models.base_models.tiny_llama import (  # the model that is trained, and nothing else of fedllm
        tiny_model,
        tiny_tokenizer,
    )

    model, tokenizer = tiny_model(dtype).train(), tiny_tokenizer()
    made = optimizer(model.parameters())
    for _ in range(STEPS):
        losses = []
        for record in RECORDS:
            before = f"<|im_start|>user\n{record['prompt']}<|im_end|>\n<|im_start|>assistant\n"
            question, answer = tokenizer(before).input_ids, tokenizer(f"{record['response']}<|im_end|>").input_ids
            tokens = torch.tensor([question + answer])
            logits = model(input_ids=tokens).logits[0, len(question) - 1 : -1]
            losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(answer)))
        made.zero_grad()
        torch.stack(losses).mean().backward()
        made.step()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float64", 1e-12)])
@pytest.mark.parametrize(
    ("settings", "optimizer"),
    [
        ({"lr": 0.05}, lambda p: torch.optim.SGD(p, lr=0.05)),
        ({"lr": 0.02, "momentum": 0.9}, lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9)),
        (
            {"lr": 1e-3, "optimizer": "adamw", "weight_decay": 0.1, "eps": 1e-3},
            lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1, eps=1e-3),
        ),
    ],
    ids=["sgd", "momentum", "adamw"],
)
def test_one_client_and_one_round_are_plain_training(
    tmp_path: Path, dtype: str, tolerance: float, settings: dict[str, Any], optimizer: Optimizers
) -> None:
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    experiment = small(
        tmp_path / "data.jsonl",
        task={"model": "tiny-llama", "adapter": "full", "device": "cpu", "dtype": dtype},
        federation={"shards": {"data": str(tmp_path / "data.jsonl"), "clients": 1, "heldout": 0.0}},
        work={"sgd": {"steps": STEPS, "batch_size": len(RECORDS), "max_length": 128, **settings}},
        evaluation={"metrics": []},
        rounds=1,
    )
    params = fedllm.run(experiment, out=tmp_path / "run").params
    expected = trained(getattr(torch, dtype), optimizer)
    start = trained(getattr(torch, dtype), lambda p: torch.optim.SGD(p, lr=0.0))
    moved = max(float((expected[name] - start[name]).abs().max()) for name in expected)
    assert moved > 1e-3, "training has moved the weights"
    assert params.keys() == expected.keys()
    for name, leaf in params.items():
        assert leaf.dtype == getattr(torch, dtype)
        assert float((leaf - expected[name]).abs().max()) < tolerance, name
