"""FedProx: the pull by hand; its fixed point is in tests/papers/test_fedavg.py."""

from __future__ import annotations

import pytest
import torch

from fedllm.errors import ConfigError
from fedllm.messages.context import ClientContext, RoundContext
from fedllm.rng import Key
from fedllm.stages.client_drift.prox import Prox
from fedllm.stages.round_trip import adjust_grads, receive_all
from fedllm.stages.weighting.by_examples import ByExamples
from fedllm.tensors import tree
from tests.papers.quadratics import federate

LOCAL = ClientContext(RoundContext(round=0, key=Key(1), cohort=1, population=1))


def test_the_pull_is_mu_times_the_distance_from_the_start():
    start, arrival = receive_all([Prox(mu=0.5)], {"w": torch.tensor([[1.0, 2.0]])}, [{}], [{}], LOCAL)
    now = {"w": start["w"] + torch.tensor([[4.0, -2.0]])}
    grads = adjust_grads([Prox(mu=0.5)], arrival, {"w": torch.tensor([[1.0, 1.0]])}, now)
    assert grads["w"].tolist() == [[3.0, 0.0]]


def test_leaves_that_it_did_not_receive_are_left_alone():
    _, arrival = receive_all([Prox(mu=0.5)], {"w": torch.zeros(1)}, [{}], [{}], LOCAL)
    grads = {"w": torch.ones(1), "own": torch.ones(1)}
    adjusted = adjust_grads([Prox(mu=0.5)], arrival, grads, {"w": torch.ones(1), "own": torch.ones(1)})
    assert float(adjusted["w"]) == 1.5
    assert float(adjusted["own"]) == 1


def test_mu_0_is_fedavg_to_the_bit():
    plain = federate([ByExamples()], 5).params
    assert tree.digest(federate([Prox(mu=0), ByExamples()], 5).params) == tree.digest(plain)
    assert tree.digest(federate([Prox(mu=0.01), ByExamples()], 5).params) != tree.digest(plain)


@pytest.mark.parametrize("mu", [-0.1, float("nan"), float("inf")])
def test_mu_out_of_range_is_refused(mu):
    with pytest.raises(ConfigError, match=r"^prox.mu is .*; it must be at least 0 and finite$"):
        Prox(mu=mu)
