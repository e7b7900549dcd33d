"""FedDyn: one round by hand; textbook loops are in tests/papers/test_drift_correction.py."""

from __future__ import annotations

import pytest
import torch

from fedllm.errors import ConfigError
from fedllm.messages.context import ClientContext, RoundContext
from fedllm.messages.traits import Fact
from fedllm.messages.update import Part, Update
from fedllm.rng import Key
from fedllm.stages.client_drift.dyn import Dyn

CTX = RoundContext(round=0, key=Key(1), cohort=3, population=4)
STAGE = Dyn(alpha=0.5)


def leaf(*values):
    return {"w": torch.tensor([values], dtype=torch.float64)}


def test_a_clients_round_by_hand():
    # grad 1, h_k 3, moved by 4 from the start: 1 - 3 + 0.5 * 4 = 0; then delta 6: h_k = 3 - 0.5 * 6 = 0
    _, scratch = STAGE.receive(leaf(10.0), {}, leaf(3.0), ClientContext(CTX))
    assert float(STAGE.grads(leaf(1.0), leaf(14.0), scratch)["w"]) == 0
    sent, memory = STAGE.encode(Update({"delta": Part(leaf(6.0))}), scratch, leaf(3.0), ClientContext(CTX))
    assert float(memory["w"]) == 0
    assert float(sent.parts["delta"].tree["w"]) == 6


def test_the_servers_round_by_hand():
    # of four clients three were drawn and two answered, mean delta 3: h = 1 - 0.5 * 6/4; step = 3 - 0.25/0.5
    total, state = STAGE.decode(Update({"delta": Part(leaf(3.0), 2.0)}), leaf(0.0), leaf(1.0), CTX)
    assert float(state["w"]) == 0.25
    assert float(total.parts["delta"].tree["w"]) == 2.5


def test_a_round_without_answers_changes_nothing():
    total, state = STAGE.decode(Update({"delta": Part(leaf(0.0), 0.0)}), leaf(0.0), leaf(1.0), CTX)
    assert float(state["w"]) == 1
    assert float(total.parts["delta"].tree["w"]) == 0


def test_leaves_without_a_delta_rest():
    memory = {**leaf(3.0), "b": torch.ones(2)}
    _, scratch = STAGE.receive({**leaf(0.0), "b": torch.zeros(2)}, {}, memory, ClientContext(CTX))
    _, after = STAGE.encode(Update({"delta": Part(leaf(6.0))}), scratch, memory, ClientContext(CTX))
    assert torch.equal(after["b"], torch.ones(2))


def test_it_needs_equal_weights_and_names_its_optimisers():
    assert Fact.EQUAL_WEIGHTS in Dyn().traits.needs
    assert Dyn().traits.optimizers == {"sgd"}
    assert Dyn(allow=("momentum",)).traits.optimizers == {"sgd", "momentum"}


@pytest.mark.parametrize("alpha", [0, -1.0, float("nan"), float("inf")])
def test_alpha_out_of_range_is_refused(alpha):
    with pytest.raises(ConfigError, match=r"^dyn.alpha is .*; it must be above 0 and finite$"):
        Dyn(alpha=alpha)
