"""Every rule of `check`: a combination that it refuses, and its nearest relative that it lets pass."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise, permutations

import pytest

from fedllm.aggregators.base import Aggregator
from fedllm.aggregators.secure_sum import SecureSum
from fedllm.aggregators.sum import Sum
from fedllm.data.sampling import All, PoissonSampling, UniformSampling
from fedllm.data.shards import Shards
from fedllm.errors import CheckError, config_name
from fedllm.experiment.catalog import NOUNS
from fedllm.experiment.checks.check import check, check_profiles
from fedllm.experiment.checks.parties import Party, client, parties
from fedllm.experiment.checks.rules import ROWS, Conflict, conflicts
from fedllm.experiment.record import Demands, Experiment, Limits
from fedllm.experiment.schedules import Schedule
from fedllm.messages.context import Profile
from fedllm.messages.traits import DELTA, MOVED_BASE, NONE, SAME_DELTA, Bracket, Fact, Traits
from fedllm.models.adapters.lora import Lora
from fedllm.models.adapters.sparse_lora import SparseLora
from fedllm.models.adapters.weights import Full
from fedllm.models.task import Scope, Task
from fedllm.stages.base import Stage
from fedllm.stages.client_drift.dyn import Dyn
from fedllm.stages.client_drift.prox import Prox
from fedllm.stages.client_drift.scaffold import Scaffold
from fedllm.stages.compression.quantize import Quantize
from fedllm.stages.compression.top_k import TopK
from fedllm.stages.lora.bandwidth_cap import LoraCap
from fedllm.stages.lora.pad import LoraPad
from fedllm.stages.lora.product import LoraProduct
from fedllm.stages.lora.prune import LoraPrune
from fedllm.stages.lora.sparse_first import SparseFirst
from fedllm.stages.lora.svd import LoraSvd
from fedllm.stages.personalization.keep import Keep
from fedllm.stages.privacy.dp_ftrl import DpFtrl
from fedllm.stages.privacy.gaussian_dp import GaussianDp
from fedllm.stages.server_optimizers.adam import Adam
from fedllm.stages.server_optimizers.momentum import Momentum
from fedllm.stages.weighting.by_examples import ByExamples
from fedllm.stages.weighting.uniform import Uniform
from fedllm.tensors import tree
from fedllm.tensors.wire_format import DENSE
from fedllm.training.base import Work
from fedllm.training.sgd import Sgd
from tests.conformance.table import CASES
from tests.papers.quadratics import federate

COHORT = Uniform("cohort")


@dataclass(frozen=True)
class Sends(Stage):
    """Has a client half, which changes nothing here."""

    def encode(self, update, scratch, memory, local):
        return update, memory


@dataclass(frozen=True)
class Clip(Stage):
    """Scales every part to a 2-norm of at most `clip`, as a private stage would."""

    clip: float = 1.0
    traits = Traits(Bracket.PRIVATE, takes=frozenset({"delta", "metrics", "counts"}), gives=Fact.BOUNDED)

    def encode(self, update, scratch, memory, local):
        parts = {}
        for name, part in update.parts.items():
            factor = min(1.0, self.clip / max(tree.norm(part.tree), 1e-300))
            parts[name] = replace(part, tree=tree.scale(part.tree, factor), wire_format=DENSE)
        return replace(update, parts=parts), memory


@dataclass(frozen=True)
class ClipDelta(Clip):
    traits = Traits(Bracket.PRIVATE, takes=DELTA, gives=Fact.BOUNDED)


@dataclass(frozen=True)
class EarlyClip(Clip):
    traits = replace(Clip.traits, bracket=Bracket.MEANING)


@dataclass(frozen=True)
class Flip(Sends):
    """An attack that keeps the norm."""

    traits = Traits(Bracket.ADVERSARY, keeps=Fact.BOUNDED)


@dataclass(frozen=True)
class Boost(Sends):
    traits = Traits(Bracket.ADVERSARY)


@dataclass(frozen=True)
class Grid(Sends):
    """Rounds to integers."""

    traits = Traits(Bracket.WIRE, gives=Fact.INTEGERS, keeps=Fact.BOUNDED)


@dataclass(frozen=True)
class Product(Sends):
    traits = Traits(needs=Fact.SHAPE | Fact.ALL_TENSORS, gives=Fact.ONE_SHAPE, loses=Fact.SHAPE)


@dataclass(frozen=True)
class Turn(Stage):
    """Writes the factors in another basis; `delta` stays what it is."""

    traits = Traits(loses=Fact.FIXED_BASIS)


@dataclass(frozen=True)
class TurnWhole(Sends):
    """What stands behind it works on another shape."""

    traits = Traits(loses=Fact.FIXED_BASIS | Fact.SHAPE)


@dataclass(frozen=True)
class Away(Sends):
    """Takes the factors out of the delta."""

    traits = Traits(makes=frozenset({"rows"}), loses=Fact.SHAPE | Fact.ENTRIES)


@dataclass(frozen=True)
class Blocks(Stage):
    traits = Traits(loses=Fact.HIDDEN)


@dataclass(frozen=True)
class Distil(Stage):
    traits = Traits(takes=frozenset({"logits"}))


@dataclass(frozen=True)
class Second(Sends):
    """A second maker of what SCAFFOLD makes."""

    traits = Traits(makes=frozenset({"control"}), keeps=SAME_DELTA)


@dataclass(frozen=True)
class Late(Sends):
    traits = Traits(Bracket.WIRE, makes=frozenset({"late"}), keeps=Fact.BOUNDED)


@dataclass(frozen=True)
class Secret(Aggregator):
    traits = Traits()


@dataclass(frozen=True)
class Median(Aggregator):
    """Needs the update of each client."""


@dataclass(frozen=True)
class Integers(Aggregator):
    traits = Traits(needs=Fact.INTEGERS)


@dataclass(frozen=True)
class Noisy(Aggregator):
    """Relies on a bound of every client's update."""

    traits = Traits(needs=Fact.BOUNDED)


@dataclass(frozen=True)
class Logits(Work):
    rule = "sgd"
    traits = Traits(makes=frozenset({"delta", "logits"}))


@dataclass(frozen=True)
class NoFigures(Work):
    rule = "sgd"
    traits = Traits(makes=frozenset({"delta"}))


@dataclass(frozen=True)
class ZerothOrder(Work):
    """Steps along drawn directions, by differences of losses."""

    rule = "sgd"
    traits = replace(Sgd(steps=1).traits, loses=Fact.GRADIENTS)


@dataclass(frozen=True)
class Asynchronous(Schedule):
    """Adds up updates as they come."""

    traits = Traits(loses=Fact.SAME_START)


@dataclass(frozen=True)
class Gossip(Schedule):
    """Clients send to each other."""

    traits = Traits(loses=Fact.SERVER_STATE)


@dataclass(frozen=True)
class Moves(Stage):
    """Adds to the frozen weights."""

    traits = Traits(needs=MOVED_BASE)


@dataclass(frozen=True)
class Shrinks(Stage):
    traits = Traits(loses=Fact.FIXED_SIZES)


@dataclass(frozen=True)
class Weighs(Sends):
    """Gives each client a weight of its own."""

    traits = Traits(keeps=SAME_DELTA | Fact.BOUNDED, loses=Fact.EQUAL_WEIGHTS)


SGD = Sgd(steps=1)
TASK = Task("tiny-llama")
SECRET = Demands(secrecy=True)
PLAIN = Experiment(task=Task("tiny-llama"), federation=Shards("quickstart"), work=SGD, stages=(ByExamples(),))


def experiment(*stages: Stage, **settings) -> Experiment:
    return replace(PLAIN, stages=stages, **settings)


def of(*stages: Stage, share: str = "*", **settings) -> Experiment:
    return experiment(*stages, **{"task": replace(TASK, scope=Scope(share=(share,))), **settings})


# rule: (refused, what the message names, the relative that passes)
RULES = {
    "correlated noise and other tensors": (
        of(COHORT, DpFtrl(1.0, 1.0), task=replace(TASK, scope=Scope(alternate=("*lora_A", "*lora_B")))),
        "dp_ftrl correlates the noise of one round .*, but task.scope.alternate sends other tensors in some rounds; .*"
        "gaussian_dp",
        of(COHORT, DpFtrl(1.0, 1.0)),
    ),
    "a bound and one bit": (
        of(COHORT, GaussianDp(1.0, 1.0), Quantize(bits=1)),
        "gaussian_dp bounds the norm of an update, but quantize behind it does not say by how much it may grow it",
        of(COHORT, GaussianDp(1.0, 1.0), Quantize(bits=8)),
    ),
    "brackets": (
        of(Uniform(), TopK(0.5)),
        r"stages: top_k \(MEANING\) stands after uniform \(WEIGH\); put it before",
        of(TopK(0.5), Uniform()),
    ),
    "wire before private": (
        of(COHORT, Quantize(bits=8), Clip()),
        r"clip \(PRIVATE\) stands after quantize \(WIRE\)",
        of(COHORT, Clip(), Quantize(bits=8)),
    ),
    "adversary between private and wire": (
        of(COHORT, Flip(), Clip()),
        r"clip \(PRIVATE\) stands after flip \(ADVERSARY\)",
        of(COHORT, Clip(), Flip(), Quantize(bits=8)),
    ),
    "keep is first": (
        of(Prox(), Keep(("*lora_B",)), Uniform()),
        r"keep \(LOCAL\) stands after prox \(MEANING\); put it before, for stages run in the order LOCAL, MEANING",
        of(Keep(("*lora_B",)), Prox(), Uniform()),
    ),
    "two that are first": (
        of(Momentum(), Keep(("*A",)), ByExamples(), share="*lora_A"),
        r"keep \(LOCAL\) stands after momentum",
        of(Keep(("*A",)), Momentum(), ByExamples(), share="*lora_A"),
    ),
    "no weigher": (of(Prox()), r"exactly one stage must weigh .*; found none", of(Prox(), ByExamples())),
    "no stages": (of(), "exactly one stage must weigh", of(ByExamples())),
    "two weighers": (of(ByExamples(), Uniform()), "found by_examples and uniform", of(Uniform())),
    "equal weights": (
        of(Dyn(), ByExamples()),
        "dyn is right only if every client weighs the same, but by_examples weighs them differently",
        of(Dyn(), Uniform()),
    ),
    "a bound needs equal weights": (
        of(ByExamples(), Clip()),
        "clip is right only if every client weighs the same, but by_examples weighs them differently; use uniform",
        of(COHORT, Clip()),
    ),
    "a bound needs a fixed denominator": (
        of(Uniform(), Clip()),
        "clip bounds .* but uniform divides by a number that depends on who answered; set its denominator: cohort",
        of(COHORT, Clip()),
    ),
    "taken, not made": (
        of(Distil(), Uniform()),
        r"distil takes the part 'logits', which nothing before it makes \(made so far: counts, delta, metrics\)",
        of(Distil(), Uniform(), work=Logits()),
    ),
    "made after it is taken": (
        of(Uniform(), Distil()),
        "distil",
        of(Distil(), Uniform(), work=Logits()),
    ),
    "made twice by stages": (
        of(Scaffold(), Second(), Uniform()),
        "second makes the part 'control', which scaffold makes already",
        of(Scaffold(), Uniform()),
    ),
    "made twice by the same stage": (of(Scaffold(), Scaffold(), Uniform()), "which scaffold makes", of(Uniform())),
    "made by the work, taken by nobody": (
        of(Uniform(), work=Logits()),
        "logits makes the part 'logits', which no stage takes",
        of(Distil(), Uniform(), work=Logits()),
    ),
    "growth after a bound": (
        of(COHORT, Clip(), Boost()),
        "clip bounds the norm of an update, but boost behind it does not say .*; put boost before clip",
        of(COHORT, Clip(), Flip(), Quantize(bits=4)),
    ),
    "an error feedback undoes a clip": (
        of(EarlyClip(), TopK(0.5), Uniform()),
        "early_clip bounds the norm of an update, but top_k",
        of(TopK(0.5), EarlyClip(), Uniform()),
    ),
    "a part that is not clipped": (
        of(Scaffold(), COHORT, Clip()),
        "clip bounds what one client can change, but not the part 'control' that scaffold makes",
        of(Prox(), COHORT, Clip()),
    ),
    "figures that are not clipped": (
        of(COHORT, ClipDelta()),
        "clip_delta bounds .* but not the part 'counts' that sgd makes",
        of(COHORT, ClipDelta(), work=NoFigures()),
    ),
    "a part made after the clip": (
        of(COHORT, Clip(), Late()),
        "late makes the part 'late' after clip, which could not bound it",
        of(COHORT, Late()),
    ),
    "integers innermost": (
        of(COHORT, Grid(), Quantize(bits=8)),
        "grid yields integers, but quantize behind it would make fractions of them; put quantize before grid",
        of(COHORT, Quantize(bits=8), Grid()),
    ),
    "integers for who adds them": (
        of(COHORT, Quantize(bits=8), aggregator=Integers()),
        "aggregator integers adds integers, but no stage yields integers; put the stage fixed_point last",
        of(COHORT, Grid(), aggregator=Integers()),
    ),
    "secrecy: who sees each": (
        of(Uniform(), demands=SECRET, aggregator=Median()),
        "demands.secrecy .* nothing but sums, but aggregator median shows it the update of each client",
        of(Uniform(), demands=SECRET, aggregator=Secret()),
    ),
    "secrecy: a plain sum": (
        of(Uniform(), demands=SECRET),
        "aggregator sum shows it the update of each client; .* set demands.secrecy to false",
        of(Uniform()),
    ),
    "secrecy: a sum that shows each": (
        of(Blocks(), Uniform(), demands=SECRET, aggregator=Secret()),
        "demands.secrecy .* but blocks shows it the update of each client; leave out blocks",
        of(Blocks(), Uniform(), aggregator=Secret()),
    ),
    "kept leaves and another shape": (
        of(Keep(("*A",)), Product(), Uniform()),
        "product works on both factors of every layer, but keep keeps tensors on the client",
        of(Product(), Uniform()),
    ),
    "a shared scope and another shape": (
        of(Product(), Uniform(), share="*lora_A"),
        r"product works .*, but keep \(task.scope.share asks for it\) keeps tensors on the client",
        of(Prox(), Uniform(), share="*lora_A"),
    ),
    "single entries before another basis": (
        of(Prox(), Momentum(), Turn(), Uniform()),
        "momentum is right only while an entry of lora_A or lora_B stands for the same in all rounds, but turn writes",
        of(Prox(), TurnWhole(), Momentum(), Uniform()),
    ),
    "single entries behind another basis of the same shape": (
        of(Turn(), Momentum(), Uniform()),
        "but turn writes .* or list lora_product in place of turn and before momentum",
        of(TurnWhole(), Momentum(), Uniform()),
    ),
    "single entries before another basis of another shape": (
        of(Momentum(), TurnWhole(), Uniform()),
        "but turn_whole writes .* or put momentum behind turn_whole",
        of(TurnWhole(), Momentum(), Uniform()),
    ),
    "controls of local steps before another basis": (
        of(Dyn(), Turn(), Uniform()),
        "but turn writes their product in another basis after each; leave out one of the two$",
        of(Prox(), Turn(), Uniform()),
    ),
    "local steps against another shape": (
        of(Product(), Dyn(), Uniform()),
        "dyn compares the update with the local steps, but product changes the update before it",
        of(Dyn(), Uniform()),
    ),
    "single entries that are gone": (
        of(Prox(), Away(), TopK(0.5), Uniform()),
        "top_k keeps something for each entry .* but away before it takes them .*; put top_k before away",
        of(Prox(), TopK(0.5), Away(), Uniform()),
    ),
    "moments of what clients came to": (
        of(LoraProduct("product"), Momentum(), Uniform()),
        "momentum works on how far clients have moved, but lora_product before it sends .*form: update",
        of(LoraProduct("update"), Momentum(), Uniform()),
    ),
    "a bound of what clients came to": (
        of(LoraProduct("product"), EarlyClip(), Uniform()),
        "early_clip works on how far clients have moved, but lora_product",
        of(LoraProduct("update"), EarlyClip(), Uniform()),
    ),
    "controls from what another stage has changed": (
        of(TopK(0.5), Scaffold(), Uniform()),
        "scaffold compares the update with the local steps, but top_k .*; put top_k behind scaffold",
        of(Scaffold(), TopK(0.5), Uniform()),
    ),
    "a sum of other updates than the clients remember": (
        of(Dyn(), TopK(0.5), Uniform()),
        "dyn is right only if the server adds up the updates as their clients remember them, but top_k behind",
        of(Dyn(), COHORT, Flip()),
    ),
    "two that take the server's step": (
        of(Momentum(), Dyn(), Uniform()),
        "dyn takes the server's step and is derived as the only stage that does, but momentum",
        of(Momentum(), Uniform()),
    ),
    "what the mean lacks, behind another step": (
        of(Momentum(), Moves(), Uniform()),
        "moves adds to the frozen .* mean of the factors lacks, but momentum .*; put momentum behind moves",
        of(Moves(), Momentum(), Uniform()),
    ),
    "frozen weights in few bits": (
        of(Moves(), Uniform(), task=replace(TASK, quantize="int4")),
        "moves adds to the matrices of the base model, but task.quantize holds them in int4",
        of(Moves(), Uniform()),
    ),
    "an adapter that writes over few bits": (
        of(Uniform(), task=replace(TASK, adapter=Full(), quantize="int8")),
        "task.adapter is full and changes the matrices of the base model, but task.quantize holds them in int8",
        of(Uniform(), task=replace(TASK, adapter=Full())),
    ),
    "factors of an adapter that has none": (
        of(LoraSvd(), Uniform(), task=replace(TASK, adapter=Full())),
        "lora_svd works on lora_A and lora_B of each layer, but task.adapter is full, which has none; use lora",
        of(LoraSvd(), Uniform()),
    ),
    "the one adapter of a stage": (
        of(SparseFirst(), Uniform()),
        "sparse_first works on the adapter sparse_lora, but task.adapter is lora; use sparse_lora",
        of(SparseFirst(), Uniform(), task=replace(TASK, adapter=SparseLora())),
    ),
    "factors that are gone": (
        of(Away(), LoraPad(), Uniform()),
        "lora_pad works on lora_A and lora_B in the part 'delta', but away takes them out before it",
        of(Away(), Uniform()),
    ),
    "a factor that stands still": (
        of(LoraSvd(), Uniform(), task=replace(TASK, scope=Scope(alternate=("*lora_A", "*lora_B")))),
        "lora_svd works on both factors of lora, but task.scope.alternate lets one of them stand still",
        of(LoraSvd(), Uniform(), task=replace(TASK, scope=Scope(hold=("*lora_A",)))),
    ),
    "tensors that shrink, encoded before": (
        of(TopK(0.5), Shrinks(), Uniform()),
        "top_k works on tensors of one size, but shrinks shrinks those .*; put top_k on the other side of shrinks",
        of(Shrinks(), TopK(0.5), Uniform()),
    ),
    "tensors that shrink, received behind": (
        of(Shrinks(), Prox(), Uniform()),
        "prox works on tensors of one size, but shrinks .*; put prox on the other side of shrinks",
        of(Prox(), Shrinks(), Uniform()),
    ),
    "weights of its own": (
        of(Dyn(), LoraPrune(), Uniform()),
        "dyn is right only if .*, but lora_prune",
        of(LoraPrune(), Uniform()),
    ),
    "equal weights beside weights of its own": (
        of(Weighs(), COHORT, Clip()),
        "clip is right only if every client weighs the same, but weighs weighs them differently; leave out one",
        of(Weighs(), Uniform()),
    ),
    "a mean over contributors and lost clients": (
        of(LoraPad("contributors"), COHORT),
        "lora_pad divides by the weights of those who answered, but uniform divides by .* drawn; set the denominator",
        of(LoraPad("padded"), COHORT),
    ),
    "what was fitted to a bandwidth": (
        of(LoraPad(), Uniform(), LoraCap(), Quantize(bits=8)),
        "lora_cap fits the update to a bandwidth, but quantize behind it would change its size; put quantize before",
        of(LoraPad(), Uniform(), Quantize(bits=8), LoraCap()),
    ),
    "gradients of a work that has none": (
        of(Prox(), Uniform(), work=ZerothOrder()),
        "prox changes the gradients of the local steps, but work zeroth_order uses none; leave out one of the two",
        of(Momentum(), Uniform(), work=ZerothOrder()),
    ),
    "one start and updates as they come": (
        of(LoraSvd(), Uniform(), schedule=Asynchronous()),
        "lora_svd is right only if all updates of a sum began from the same .*, but schedule asynchronous",
        of(Momentum(), Uniform(), schedule=Asynchronous()),
    ),
    "a server's state without a server": (
        of(Momentum(), Uniform(), schedule=Gossip()),
        "momentum keeps a state on the server from round to round, but schedule gossip has no server",
        of(Prox(), Uniform(), schedule=Gossip()),
    ),
    "an aggregator that needs a bound": (
        of(Uniform(), aggregator=Noisy()),
        "aggregator noisy needs a bound, but no stage bounds the norm of an update; add a stage that does",
        of(EarlyClip(), Uniform(), aggregator=Noisy()),
    ),
    "SCAFFOLD and AdamW": (
        of(Scaffold(), Uniform(), work=Sgd(optimizer="adamw", steps=1)),
        r"scaffold is derived for plain SGD, but work uses adamw: .* permit it with scaffold: \{allow: \[adamw\]\}",
        of(Scaffold(allow=("adamw",)), Uniform(), work=Sgd(optimizer="adamw", steps=1)),
    ),
    "FedDyn and momentum": (
        of(Dyn(), Uniform(), work=Sgd(momentum=0.9, steps=1)),
        r"dyn is derived for plain SGD, but work uses momentum: .*dyn: \{allow: \[momentum\]\}",
        of(Dyn(allow=("momentum",)), Uniform(), work=Sgd(momentum=0.9, steps=1)),
    ),
    "what is allowed is that alone": (
        of(Dyn(allow=("momentum",)), Uniform(), work=Sgd(optimizer="adamw", steps=1)),
        "work uses adamw",
        of(Dyn(), Uniform()),
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_a_broken_rule_is_refused_with_its_reason(rule):
    refused, message, _ = RULES[rule]
    with pytest.raises(CheckError, match=message):
        check(refused)


@pytest.mark.parametrize("rule", RULES)
def test_the_nearest_sound_relative_passes(rule):
    check(RULES[rule][2])


def test_a_message_is_one_line_that_says_what_to_do():
    for refused, _, _ in RULES.values():
        with pytest.raises(CheckError) as caught:
            check(refused)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) > 40


def test_a_list_of_many_sound_stages_passes():
    check(of(Keep(("*A",)), Adam(), Prox(), TopK(0.5), COHORT, Clip(), Quantize(bits=4), Grid(), aggregator=Integers()))


@pytest.mark.parametrize("noun", [Stage, Aggregator, Work])
def test_messages_name_components_as_files_do(noun):
    for name, cls in NOUNS[noun].items():
        assert config_name(cls.__new__(cls)) == name


PLAIN_RANK, LOW_RANK = Profile(), Profile(rank=4)


LORA = Lora(rank=8)


def ranked(*stages: Stage, adapter=LORA) -> Experiment:
    return experiment(*stages, task=Task("tiny-llama", adapter=adapter))


BANDWIDTH = Profile(bandwidth=99)
CAPPED = ranked(LoraPad(), Uniform(), LoraCap())
# rule: (refused, what client b is, what the message names)
CLIENTS = {
    "ranks and updates of one shape": (ranked(Uniform()), LOW_RANK, "rank 4 and .* 8, but no stage brings .* lora_pad"),
    "ranks and a part": (
        ranked(Product(), Scaffold(), Uniform()),
        LOW_RANK,
        "rank 4 .*, but scaffold makes the part 'control' in the shape of the parameters; .*, or leave out scaffold",
    ),
    "ranks and an adapter of one shape": (
        ranked(Uniform(), adapter=Full()),
        LOW_RANK,
        "has rank 4, but task.adapter is full, whose tensors have one shape",
    ),
    "ranks and equal components": (
        ranked(Dyn(), LoraPad(), Uniform()),
        LOW_RANK,
        "dyn is right only if every client counts the same in each component, but client b has rank 4",
    ),
    "a bandwidth that nobody sees to": (ranked(Uniform()), BANDWIDTH, "bandwidth of 99 .*, but no stage fits .* haflq"),
    "a bandwidth and equal components": (
        replace(CAPPED, stages=(Dyn(), *CAPPED.stages)),
        BANDWIDTH,
        "dyn is right only if .* in each component, but client b has a bandwidth of 99 bytes a round",
    ),
}  # fmt: skip


@pytest.mark.parametrize("rule", CLIENTS)
def test_a_client_that_does_not_suit_is_named(rule):
    refused, profile, message = CLIENTS[rule]
    with pytest.raises(CheckError, match=message) as caught:
        check_profiles(refused, {"a": PLAIN_RANK, "b": profile, "c": profile})
    assert "client b" in str(caught.value)


def test_a_rank_above_the_adapters_is_refused():
    with pytest.raises(CheckError, match=r"client b has rank 9, above the rank 8 of task\.adapter; raise"):
        check_profiles(ranked(LoraPad(), Uniform()), {"a": PLAIN_RANK, "b": Profile(rank=9)})


def test_a_bandwidth_that_is_seen_to_passes():
    check_profiles(CAPPED, {"a": PLAIN_RANK, "b": BANDWIDTH})


def broken() -> set[Fact]:
    """The facts that experiments of the tables break."""
    found = {conflict.fact for refused, _, _ in RULES.values() for conflict in conflicts(parties(refused))}
    for refused, profile, _ in CLIENTS.values():
        everyone = [*parties(refused), client("b", profile, refused.task)]
        found |= {conflict.fact for conflict in conflicts(everyone)}
    return found


def test_every_fact_has_its_row_and_is_needed_by_somebody_and_lost_by_somebody():
    """What nobody needs, or nobody loses, is a word without a meaning."""
    assert list(ROWS) == list(Fact), "one row for each fact, in its order"
    assert broken() == set(Fact)


def test_every_fact_is_spoken_of_by_a_component_of_the_catalog():
    """Those that are only lost by what is still to come are needed today."""
    components = [
        *(case.stage for case in CASES.values()),
        LoraPad("contributors"),
        LoraProduct("product"),
        COHORT,
        Sum(),
        SecureSum(),
    ]
    declared = [component.traits for component in components]
    said = {fact for traits in declared for fact in traits.needs | traits.gives | traits.loses}
    assert set(Fact) == said


@pytest.mark.parametrize("fact", Fact)
def test_a_word_of_the_party_stands_in_place_of_the_rows(fact):
    def party(name: str, needs: Fact = NONE, loses: Fact = NONE) -> Party:
        return Party(name, Traits(needs=needs, loses=loses), words={fact: f"says why ({name})"})

    sentence = str(Conflict(fact, party("one", fact), party("two", NONE, fact)))
    assert sentence.startswith("one says why (one), but two says why (two); ")
    assert "{" not in sentence


def test_ranks_that_are_the_adapters_or_brought_to_one_shape_pass():
    check_profiles(ranked(Uniform()), {"a": PLAIN_RANK, "b": Profile(rank=8)})
    check_profiles(ranked(Scaffold(), Uniform()), {"a": PLAIN_RANK, "b": Profile(rank=8)})
    check_profiles(ranked(Product(), Uniform()), {"a": PLAIN_RANK, "b": LOW_RANK})
    check_profiles(ranked(Momentum(), LoraPad(), Uniform()), {"a": PLAIN_RANK, "b": LOW_RANK})
    check_profiles(ranked(Dyn(), LoraPad(), Uniform()), {"a": PLAIN_RANK, "b": Profile(rank=8)})
    check_profiles(ranked(Uniform(), adapter=Full()), {"a": PLAIN_RANK})


SIX = (Keep(("*lora_B",)), Prox(mu=0.5), TopK(0.5), Uniform("cohort"), Clip(0.5), Quantize(bits=4))


def test_of_720_orders_those_that_pass_are_one_method_and_most_others_run_and_differ():
    """Prox acts on gradients and TopK on updates, so their order is free; every other place is forced.

    All 720 orders run without an error, which is why a list of stages needs a check.
    """
    passing, results = [], {}
    for order in permutations(SIX):
        results[order] = tree.digest(federate(list(order), 2, lrs=(0.1, 0.1)).params)
        try:
            check(of(*order))
            passing.append(order)
        except CheckError:
            pass
    keep, prox, top_k, *rest = SIX
    assert passing == [(keep, prox, top_k, *rest), (keep, top_k, prox, *rest)]
    assert results[passing[0]] == results[passing[1]]
    wrong = [order for order, result in results.items() if result != results[passing[0]]]
    assert len(wrong) == 690
    assert all(
        any(a.traits.bracket > b.traits.bracket for a, b in pairwise(order)) or order[0] is not keep for order in wrong
    )  # what differs is refused for its order alone


@pytest.mark.parametrize(
    ("sampling", "most"), [(All(), 4), (UniformSampling(cohort=3), 3), (PoissonSampling(rate=0.1), 4)]
)
def test_a_quorum_is_at_most_what_a_round_asks(sampling, most):
    def made(quorum: int) -> Experiment:
        return experiment(Uniform(), federation=Shards("quickstart", sampling=sampling), limits=Limits(quorum=quorum))

    profiles = dict.fromkeys("abcd", Profile())
    check_profiles(made(most), profiles)
    with pytest.raises(CheckError, match=f"limits.quorum is {most + 1}, but a round asks {most} of 4 clients at most"):
        check_profiles(made(most + 1), profiles)


def test_the_smallest_quorum_suits_a_round_that_asks_nobody():
    check_profiles(
        experiment(Uniform(), federation=Shards("quickstart", sampling=PoissonSampling(0.0))), {"a": PLAIN_RANK}
    )
