"""On a GPU: attention of unequal lengths, and the batched engine against the serial one and the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fedllm.engines.batched.engine import Batched
from fedllm.engines.serial import Serial
from fedllm.experiment.record import Experiment
from fedllm.models.layers.cross_entropy import row_losses
from fedllm.models.layers.short_attention import short_attention
from fedllm.models.layers.varlen_attention import fits, varlen_attention
from fedllm.stages.weighting.uniform import Uniform
from tests.engines.cohort import SGD, Slice, experiment, farthest, sent, write_records

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
LENGTHS = (5, 1, 130, 64)


def drawn(heads: int, wide: int = 64) -> torch.Tensor:
    return torch.randn(heads, sum(LENGTHS), wide, generator=torch.Generator().manual_seed(heads)).bfloat16()


@pytest.mark.parametrize("window", [None, 7])
def test_attention_of_unequal_lengths_is_the_plain_one(window: int | None) -> None:
    query, key, value = (states.requires_grad_() for states in (drawn(9), drawn(3), drawn(3) * 2))
    there = [states.detach().cuda().requires_grad_() for states in (query, key, value)]
    assert fits(there[0], there[2])
    found = varlen_attention(*there, LENGTHS, 0.125, window)
    wide = [states.detach().double().requires_grad_() for states in (query, key, value)]
    expected = short_attention(*wide, LENGTHS, 0.125, window)
    gradient = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    found.backward(gradient.to(found))
    expected.backward(gradient.double())
    for ours, theirs in [(found, expected), *((a.grad, b.grad) for a, b in zip(there, wide, strict=True))]:
        assert ours is not None and theirs is not None
        assert float((ours.detach().cpu().double() - theirs.detach()).norm() / theirs.detach().norm()) < 1e-2


@pytest.mark.parametrize("ranks", [None, {"ann": 4, "ben": 1, "cid": 2, "dot": 4, "eve": 3}], ids=["equal", "mixed"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 1e-5)])
def test_batched_is_serial_on_a_gpu(tmp_path: Path, ranks: Any, dtype: str, tolerance: float) -> None:
    made = of(tmp_path, ranks=ranks, dtype=dtype, device="cuda")
    assert farthest(sent(Batched(), made), sent(Serial(), made)) < tolerance


def test_a_gpu_gives_what_a_cpu_gives(tmp_path: Path) -> None:
    there, here = (sent(Serial(), of(tmp_path, dtype="float64", device=device)) for device in ("cuda", "cpu"))
    assert farthest(there, here) < 1e-5  # transformers' norms compute in float32 whatever the type


def of(folder: Path, ranks: Any = None, **settings: Any) -> Experiment:
    stages = [Slice(), Uniform()] if ranks else [Uniform()]
    return experiment(write_records(folder / "people.jsonl"), work=SGD, ranks=ranks, stages=stages, **settings)


def test_losses_of_many_rows_are_those_of_the_cpu() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(700, 16, generator=generator), torch.randn(300, 16, generator=generator)
    targets = torch.randint(300, (700,), generator=generator)
    expected = torch.nn.functional.cross_entropy(hidden @ head.T, targets, reduction="none")
    found = row_losses(hidden.cuda().requires_grad_(), head.cuda(), targets.cuda())
    assert torch.allclose(found.cpu(), expected, atol=1e-4)
