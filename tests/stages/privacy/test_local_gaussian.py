"""Noise on the client: the message itself is noised, before anybody sees it."""

from __future__ import annotations

import pytest
import torch

from fedllm.messages.context import ClientContext, RoundContext
from fedllm.messages.update import Part, Update
from fedllm.rng import Key
from fedllm.stages.privacy.base import UnprotectedError
from fedllm.stages.privacy.local_gaussian import LocalGaussian
from fedllm.stages.privacy.no_figures import NoFigures
from tests.stages.privacy.source import Source, drawn, flat

STAGE = LocalGaussian(0.5, 2.0)


def sent(stage: LocalGaussian, seed: int) -> torch.Tensor:
    ctx = RoundContext(0, Key(0), 4, 4, client="0")
    return flat(stage.encode(next(drawn(1)), {}, {}, ClientContext(ctx, noise=Source(seed)))[0])


def test_what_is_sent_is_noised_by_its_own_client():
    noised = torch.stack([sent(STAGE, seed) for seed in range(400)])
    assert float((noised - noised.mean(0)).std()) == pytest.approx(1.0, rel=0.01)  # 2.0 x 0.5; 88,400 draws
    assert float(noised.mean(0).norm()) < 0.5 + 5 * (221 / 400) ** 0.5, "around an update below the clip"
    assert torch.equal(sent(STAGE, 1), sent(STAGE, 1)) and not torch.equal(sent(STAGE, 1), sent(STAGE, 2))


def test_nothing_is_sent_without_a_source():
    with pytest.raises(UnprotectedError, match="no source"):
        STAGE.encode(next(drawn(1)), {}, {}, ClientContext(RoundContext(0, Key(0), 4, 4, client="0")))


def test_no_figures_leave_a_private_client():
    update = (
        next(drawn(1))
        .having("metrics", Part({"loss": torch.ones(1)}))
        .having("counts", Part({"tokens": torch.ones(1)}, 0.0))
    )
    ctx = ClientContext(RoundContext(0, Key(0), 4, 4, client="0"))
    assert NoFigures().encode(update, {}, {}, ctx)[0].parts.keys() == {"delta"}
    assert NoFigures().encode(Update({"metrics": update.parts["metrics"]}), {}, {}, ctx)[0].parts == {}
