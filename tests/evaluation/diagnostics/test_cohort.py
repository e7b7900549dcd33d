"""What is seen of updates as they are sent, through the stages that put them into other shapes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from fedllm.aggregators.sum import Sum
from fedllm.evaluation.diagnostics import cohort as module
from fedllm.evaluation.diagnostics import products
from fedllm.evaluation.diagnostics.cohort import CohortStatistics
from fedllm.evaluation.settings import Diagnostics
from fedllm.events import Diagnosed
from fedllm.messages.context import ClientContext, Profile, RoundContext
from fedllm.messages.update import Part, Request, Update
from fedllm.rng import Key
from fedllm.stages.base import Stage
from fedllm.stages.lora.fair import LoraFair
from fedllm.stages.lora.pad import LoraPad
from fedllm.stages.lora.stack import LoraStack
from fedllm.stages.round_trip import Received, broadcast_all, decode_all, encode_all
from fedllm.stages.weighting.by_examples import ByExamples
from fedllm.tensors import low_rank, tree
from fedllm.tensors.tree import Tree

LAYERS = {"q": (192, 576), "down": (576, 1536)}  # out, in
EXAMPLES = (5, 3, 11)


def drawn(rank: int, seed: int) -> Tree:
    generator = torch.Generator().manual_seed(seed)
    found: Tree = {}
    for layer, (size_out, size_in) in LAYERS.items():
        b, a = (torch.randn(*shape, generator=generator) / 8 for shape in ((size_out, rank), (rank, size_in)))
        found |= low_rank.layer_leaves(layer, b, a)
    return found


@dataclass(eq=False)
class Round:
    """One round of clients whose factors after training are given; `cohort` is shown each update before it is added."""

    cohort: CohortStatistics
    server: Tree
    after: Sequence[Tree]
    stages: tuple[Stage, ...]

    def run(self) -> Diagnosed:
        states: tuple[Tree, ...] = ({},) * len(self.stages)
        everyone = RoundContext(0, Key(0), len(self.after), len(self.after))

        def call(name: str, requests: Any) -> Iterator[tuple[str, Update]]:
            for k in range(len(self.after)):
                request, update = self.sent(k, states)
                self.cohort(request, update)
                yield str(k), update

        total = Sum().reduce(call, {})
        total, _ = decode_all(self.stages, total, self.server, states, everyone)
        (found,) = self.cohort.diagnosed(0, tree.add(self.server, total.parts["delta"].tree))
        return found

    def sent(self, k: int, states: tuple[Tree, ...]) -> tuple[Request, Update]:
        profile = Profile(rank=len(self.after[k]["q.lora_A"]))
        ctx = RoundContext(0, Key(0), len(self.after), len(self.after), client=str(k), slot=k, profile=profile)
        params, extras = broadcast_all(self.stages, self.server, states, ctx)
        scratch = tuple(stage.receive(params, {}, {}, ClientContext(ctx))[1] for stage in self.stages)
        local = ClientContext(ctx, {"examples": EXAMPLES[k]}, initial_params=self.server)
        delta = Update({"delta": Part(tree.sub(self.after[k], params))})
        update, _ = encode_all(self.stages, delta, Received(scratch, (frozenset(),) * len(self.stages)), states, local)
        return Request(params, extras, ctx), update


def a_round(stages: tuple[Stage, ...], ranks: Sequence[int], *, most: int = 32) -> Round:
    smallest = min(ranks) if min(ranks) < max(ranks) else None
    after = [drawn(rank, seed) for seed, rank in enumerate(ranks, 1)]
    return Round(
        CohortStatistics(Diagnostics(clients=most), {}, 2.0, smallest),
        drawn(max(ranks), 0),
        after,
        (*stages, ByExamples()),
    )


@pytest.mark.parametrize(
    ("stages", "ranks"),
    [
        ((), (4, 4, 4)),
        ((LoraPad(),), (4, 8, 16)),
        ((LoraStack(),), (4, 8, 16)),
        ((LoraStack("contributors"),), (16, 4, 8)),
        ((LoraFair(),), (4, 4, 4)),
    ],
    ids=["delta", "padded", "stacked", "contributors", "fair"],
)
def test_factors_are_seen_through_the_shape_in_which_they_travel(
    stages: tuple[Stage, ...], ranks: tuple[int, ...]
) -> None:
    round = a_round(stages, ranks)
    found = round.run()
    for k, (seen, after) in enumerate(zip(round.cohort.seen, round.after, strict=True)):
        assert (seen.client, seen.weight) == (str(k), EXAMPLES[k])
        for layer in LAYERS:
            for name, theirs in zip((low_rank.B, low_rank.A), low_rank.pair(after, layer), strict=True):
                (mine,) = products.trained([seen], f"{layer}.{name}")
                (filled, *_) = products.trained(round.cohort.seen[k:] + round.cohort.seen[:k], f"{layer}.{name}")
                assert mine.shape == theirs.shape and torch.allclose(mine, theirs.double(), atol=1e-6)
                assert torch.equal(filled[tuple(map(slice, mine.shape))], mine) and filled.norm() == mine.norm()
        start = low_rank.sliced(round.server, ranks[k])
        assert found.clients[str(k)] == pytest.approx(tree.norm(tree.sub(after, start)), rel=1e-5)
    assert found.answered == 3 and found.drift == pytest.approx(sum(found.clients.values()) / 3, rel=1e-5)


def test_methods_lose_what_they_lose() -> None:
    """FedIT the bias of the means; LoRA-FAIR less; FlexLoRA the least that a rank allows; with room for all nothing."""
    plain, fair, flex = (a_round(stages, (4, 4, 4)).run() for stages in ((), (LoraFair(),), (LoraStack(),)))
    assert plain.bias == pytest.approx(plain.bias_of_means)
    assert plain.bias_of_means == pytest.approx(flex.bias_of_means, rel=1e-5)
    assert None not in (plain.bias, fair.bias, flex.bias)
    assert plain.bias > fair.bias > flex.bias > 0.1  # type: ignore[operator]
    roomy = Round(
        CohortStatistics(Diagnostics(), {}, 2.0, None),
        drawn(12, 0),
        [drawn(4, s) for s in (1, 2, 3)],
        (LoraStack(), ByExamples()),
    )
    assert roomy.run().bias < 1e-6  # type: ignore[operator]


def test_energy_above_the_smallest_rank_where_ranks_differ() -> None:
    mixed, equal = a_round((LoraStack(),), (4, 8, 16)).run(), a_round((LoraStack(),), (4, 4, 4)).run()
    assert mixed.smallest_rank == 4 and mixed.energy_above is not None and 0 < mixed.energy_above < 1
    assert (equal.smallest_rank, equal.energy_above) == (None, None)
    assert equal.effective_rank is not None and 1 < equal.effective_rank <= 4


def test_the_first_by_slot_are_kept_and_the_drift_of_all_is_known() -> None:
    found = a_round((), (4, 4, 4), most=2).run()
    whole = a_round((), (4, 4, 4)).run()
    assert list(found.clients) == ["0", "1"] and found.answered == 3
    assert found.drift == whole.drift and found.cosines == whole.cosines[:1]
    assert found.bias is None and found.bias_of_means is not None, "the server's step holds what was not kept"
    assert found.effective_rank == whole.effective_rank


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    size = tree.num_values(drawn(4, 0))
    monkeypatch.setattr(module, "MOST_VALUES", 2 * size + 1)
    assert list(a_round((), (4, 4, 4)).run().clients) == ["0", "1"]
    monkeypatch.setattr(module, "MOST_VALUES", size - 1)
    found = a_round((), (4, 4, 4)).run()
    assert (found.clients, found.cosine, found.bias, found.answered) == ({}, None, None, 3)


def test_cosines_are_written_for_a_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_SHOWN", 2)
    found = a_round((), (4, 4, 4)).run()
    assert found.cosines == () and found.cosine is not None


def test_dissimilarity_of_one_direction_is_one() -> None:
    """sqrt(sum p x_k^2) / |sum p x_k|: 1 if all moved alike, sqrt(2) if half of the weight moved at right angles."""
    one, other = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 3.0])
    for moved, wanted in (([one, one], 1.0), ([one, other], 2**0.5), ([one, -one], None)):
        cohort = CohortStatistics(Diagnostics(), {}, 1.0, None)
        for slot, delta in enumerate(moved):
            request = Request({"w": torch.zeros(2)}, (), RoundContext(0, Key(0), 2, 2, client=str(slot), slot=slot))
            cohort(request, Update({"delta": Part({"w": 4 * delta}, 4.0)}))
        (found,) = cohort.diagnosed(0, {"w": torch.ones(2)})
        assert found.dissimilarity == (None if wanted is None else pytest.approx(wanted, rel=1e-5))
        assert found.drift == 3 and (found.bias, found.product_norm, found.effective_rank) == (None, None, None)


def test_nobody_answered() -> None:
    assert CohortStatistics(Diagnostics(), {}, 1.0, None).diagnosed(0, {}) == []


@pytest.mark.parametrize(("fixed", "lost", "told"), [(True, 1, False), (True, 0, True), (False, 1, True)])
def test_a_mean_that_counts_lost_clients_has_no_bias_against_that_of_those_who_answered(
    fixed: bool, lost: int, told: bool
) -> None:
    whole = a_round((), (4, 4, 4))
    cohort = CohortStatistics(Diagnostics(), {}, 2.0, None, fixed)
    for k in range(3 - lost):
        cohort(*whole.sent(k, ({},)))
    (found,) = cohort.diagnosed(0, whole.server)
    assert (found.bias is not None) is told and found.bias_of_means is not None
