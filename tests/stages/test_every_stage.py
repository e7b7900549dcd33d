"""What holds for every stage, whatever its method."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fedllm.stages
from fedllm.messages.context import ClientContext, RoundContext
from fedllm.messages.traits import Bracket, Fact
from fedllm.messages.update import Part, Update
from fedllm.rng import Key
from fedllm.stages.base import Stage
from fedllm.stages.client_drift.dyn import Dyn
from fedllm.stages.client_drift.prox import Prox
from fedllm.stages.client_drift.scaffold import Scaffold
from fedllm.stages.compression.quantize import Quantize
from fedllm.stages.compression.top_k import TopK
from fedllm.stages.lora.bandwidth_cap import LoraCap
from fedllm.stages.lora.fair import LoraFair
from fedllm.stages.lora.merge import LoraMerge
from fedllm.stages.lora.pad import LoraPad
from fedllm.stages.lora.product import LoraProduct
from fedllm.stages.lora.prune import LoraPrune
from fedllm.stages.lora.residual import LoraResidual
from fedllm.stages.lora.sparse_first import SparseFirst
from fedllm.stages.lora.stack import LoraStack
from fedllm.stages.lora.svd import LoraSvd
from fedllm.stages.personalization.ditto import Ditto
from fedllm.stages.personalization.fdlora import Fdlora
from fedllm.stages.personalization.keep import Keep
from fedllm.stages.personalization.personal_last import PersonalLast
from fedllm.stages.personalization.rest_of_world import RestOfWorld
from fedllm.stages.privacy.discrete_noise import DiscreteNoise
from fedllm.stages.privacy.dp_ftrl import DpFtrl
from fedllm.stages.privacy.fixed_point import FixedPoint
from fedllm.stages.privacy.gaussian_dp import GaussianDp
from fedllm.stages.privacy.local_gaussian import LocalGaussian
from fedllm.stages.privacy.no_figures import NoFigures
from fedllm.stages.privacy.selective_encryption import SelectiveEncryption
from fedllm.stages.round_trip import broadcast_all, decode_all, encode_all, receive_all
from fedllm.stages.server_optimizers.adagrad import Adagrad
from fedllm.stages.server_optimizers.adam import Adam
from fedllm.stages.server_optimizers.momentum import Momentum
from fedllm.stages.server_optimizers.nesterov import Nesterov
from fedllm.stages.server_optimizers.yogi import Yogi
from fedllm.stages.weighting.by_examples import ByExamples
from fedllm.stages.weighting.uniform import Uniform
from fedllm.stages.zeroth_order.seed_pool import SeedPool
from fedllm.tensors import tree
from tests.papers.quadratics import federate, leaves

STAGES = [
    Adagrad(), Adam(), ByExamples(), Dyn(alpha=1.0), Keep(("*lora_B",)), Momentum(), Nesterov(), Prox(),
    LoraCap(), LoraFair(), LoraMerge(), LoraPad(), LoraProduct(), LoraPrune(), LoraResidual(), LoraStack(),
    LoraSvd(), SparseFirst(rounds=1), Quantize(bits=8),
    Scaffold(allow=("adamw",)), TopK(fraction=0.3), Uniform(), Yogi(),
    GaussianDp(1e9, 0.0), DpFtrl(1e9, 0.0), LocalGaussian(1e9, 0.0), DiscreteNoise(1e9, 0.0),
    Ditto(), Fdlora(), PersonalLast(), RestOfWorld(), SeedPool(),
    NoFigures(), SelectiveEncryption(0.3), FixedPoint(max_weight=9),
]  # fmt: skip
CTX = RoundContext(round=0, key=Key(1), cohort=2, population=2, client="0")
LOCAL = ClientContext(CTX, {"examples": 3.0, "steps": 2, "lr_sum": 0.2, "tokens": 8}, leaves(0.5))

every_stage = pytest.mark.parametrize("stage", STAGES, ids=lambda stage: type(stage).__name__)


def trained(stage):
    """States and memories after a few rounds; and the list of stages."""
    stages = sorted(
        [stage, *([] if isinstance(stage, ByExamples | Uniform) else [Uniform()])], key=lambda s: s.traits.bracket
    )
    return stages, federate(stages, 2)


@every_stage
def test_it_is_a_value(stage):
    twin = replace(stage)
    assert twin is not stage
    assert (twin, hash(twin), repr(twin)) == (stage, hash(stage), repr(stage))
    with pytest.raises(AttributeError):
        stage.rounds = 1


@every_stage
def test_evaluation_passes_and_changes_neither_memory_nor_state(stage):
    if isinstance(stage, NoFigures):
        return  # which lets none pass: tests/stages/privacy
    stages, course = trained(stage)
    params, extras = broadcast_all(stages, course.params, course.states, CTX)
    _, arrival = receive_all(stages, params, extras, course.memories[0], LOCAL)
    update = Update({"metrics": Part({"loss": torch.tensor(2.0)})})
    sent, memories = encode_all(stages, update, arrival, course.memories[0], LOCAL)
    total, states = decode_all(stages, sent, course.params, course.states, CTX)
    assert total.parts.keys() == {"metrics"}
    assert float(total.parts["metrics"].tree["loss"]) == 2
    for before, after in zip([*course.memories[0], *course.states], [*memories, *states], strict=True):
        assert tree.equal(before, after)


@every_stage
def test_an_empty_cohort_leaves_everything_finite(stage):
    stages, course = trained(stage)
    for states in ([{}] * len(stages), course.states):
        zero = Update({"delta": Part(tree.zeros_like(course.params), 0.0)})
        total, after = decode_all(stages, zero, course.params, states, CTX)
        assert total.parts.keys() == {"delta"}
        assert all(tree.finite(leaf) for leaf in [total.parts["delta"].tree, *after])
    without_state, _ = decode_all(stages, zero, course.params, [{}] * len(stages), CTX)
    assert tree.equal(without_state.parts["delta"].tree, tree.zeros_like(course.params))


@every_stage
def test_a_total_without_parts_passes(stage):
    assert stage.decode(Update({}), leaves(1.0), {}, CTX) == (Update({}), {})


@every_stage
def test_what_is_sent_may_be_summed_in_place(stage):
    """The first update is the accumulator of the sum: it may share no storage with memory or parameters."""
    stages, course = trained(stage)
    params, extras = broadcast_all(stages, course.params, course.states, CTX)
    start, arrival = receive_all(stages, params, extras, course.memories[0], LOCAL)
    delta = {name: torch.full_like(leaf, 0.25) for name, leaf in leaves(0.0).items()}
    sent, memories = encode_all(stages, Update({"delta": Part(delta)}), arrival, course.memories[0], LOCAL)
    kept = [*memories, *course.memories[0], *course.states, *extras, course.params, start, LOCAL.initial_params]
    before = [tree.digest(leaf) for leaf in kept]
    for part in sent.parts.values():
        tree.add_(part.tree, {name: torch.ones_like(leaf) for name, leaf in part.tree.items()})
    assert [tree.digest(leaf) for leaf in kept] == before


@every_stage
def test_states_and_memories_keep_to_the_shapes_of_the_parameters(stage):
    _, course = trained(stage)
    states = [{name: leaf for name, leaf in state.items() if leaf.dim()} for state in course.states]  # counts are none
    for held in [*states, *(memory for memories in course.memories for memory in memories)]:
        for name, leaf in held.items():
            assert leaf.shape == leaves(0.0)[name.removeprefix("m/").removeprefix("v/")].shape


@every_stage
def test_what_it_makes_it_takes_out_again(stage):
    stages, course = trained(stage)
    if Fact.INTEGERS in stage.traits.gives:  # all parts become integers together
        total, _ = decode_all(stages, course.sent[-1], course.params, course.states, CTX)
        assert total.parts.keys() >= {"delta"} and not {"values", "grid", "digits"} & total.parts.keys()
        return
    made = {name for update in course.sent for name in update.parts} - {"delta", "metrics"}
    assert made == stage.traits.makes
    sent = course.sent[-1].parts
    zeros = Update({name: Part(tree.zeros_like(part.tree), 0.0) for name, part in sent.items() if name != "metrics"})
    total, _ = decode_all(stages, zeros, course.params, course.states, CTX)
    assert total.parts.keys() - ({"base_delta"} if Fact.WRITABLE_BASE in stage.traits.needs else set()) == {"delta"}


@every_stage
def test_who_changes_gradients_says_so_and_who_compares_them_with_the_delta_too(stage):
    changes = type(stage).grads is not Stage.grads
    assert changes == (Fact.GRADIENTS in stage.traits.needs)
    assert (changes and "delta" in stage.traits.takes) == (Fact.LOCAL_UNITS in stage.traits.needs)


@every_stage
def test_who_keeps_the_delta_leaves_its_values_as_they_are(stage):
    """What a weigher multiplies, its own decode divides; what is kept on the client no other stage sees."""
    _, arrival = receive_all([stage], leaves(0.5), [{name: leaves(0.0)[name] for name in leaves(0.0)}], [{}], LOCAL)
    delta = {name: torch.full_like(leaf, 0.3).fill_diagonal_(0.7) for name, leaf in leaves(0.0).items()}
    marks = Part({"q": torch.ones(1)}, exact=True)
    sent, _ = encode_all([stage], Update({"delta": Part(delta), "holders": marks}), arrival, [{}], LOCAL)
    same = "delta" in sent.parts and tree.equal(sent.parts["delta"].tree, delta)
    outside = stage.traits.bracket in (Bracket.WEIGH, Bracket.LOCAL)
    assert same or outside or Fact.LOCAL_UNITS not in stage.traits.keeps
    if type(stage).encode is Stage.encode:
        assert not stage.traits.keeps, "what does not encode keeps everything"


def test_every_stage_of_the_folders_is_in_the_list():
    folder = Path(fedllm.stages.__file__).parent
    helpers = {"base", "branch_names", "clipping", "moments", "stacked_factors", "weighted_mean"}
    assert {path.stem for path in folder.glob("*/*.py")} - {"__init__", *helpers} == {
        type(stage).__module__.rpartition(".")[2] for stage in STAGES
    }
    assert all(isinstance(stage, Stage) for stage in STAGES)
