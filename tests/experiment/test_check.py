"""Every rule of `check`: a combination that it refuses, and its nearest relative that it lets pass."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise, permutations
from typing import ClassVar

import pytest

from fedllm.aggregators.base import Aggregator
from fedllm.data.sampling import All, PoissonSampling, UniformSampling
from fedllm.data.shards import Shards
from fedllm.errors import CheckError
from fedllm.experiment.catalog import NOUNS
from fedllm.experiment.checks.check import _name, check, check_profiles, check_ranks
from fedllm.experiment.record import Demands, Experiment, Limits
from fedllm.messages.context import Profile
from fedllm.models.adapters.lora import Lora
from fedllm.models.adapters.weights import Full
from fedllm.models.task import Scope, Task
from fedllm.stages.base import Bracket, Norm, Stage
from fedllm.stages.client_drift.dyn import Dyn
from fedllm.stages.client_drift.prox import Prox
from fedllm.stages.client_drift.scaffold import Scaffold
from fedllm.stages.compression.quantize import Quantize
from fedllm.stages.compression.top_k import TopK
from fedllm.stages.lora.pad import LoraPad
from fedllm.stages.lora.product import LoraProduct
from fedllm.stages.personalization.keep import Keep
from fedllm.stages.server_optimizers.adam import Adam
from fedllm.stages.server_optimizers.momentum import Momentum
from fedllm.stages.weighting.by_examples import ByExamples
from fedllm.stages.weighting.uniform import Uniform
from fedllm.tensors import tree
from fedllm.tensors.wire_format import DENSE
from fedllm.training.base import Work
from fedllm.training.sgd import Sgd
from tests.papers.quadratics import federate

COHORT = Uniform("cohort")


@dataclass(frozen=True)
class Clip(Stage):
    """Scales every part to a 2-norm of at most `clip`, as a private stage would."""

    clip: float = 1.0
    bracket: ClassVar[Bracket] = Bracket.PRIVATE
    takes: ClassVar[frozenset[str]] = frozenset({"delta", "metrics", "counts"})
    norm: ClassVar[Norm] = Norm.BOUNDS

    def encode(self, update, scratch, memory, local):
        parts = {}
        for name, part in update.parts.items():
            factor = min(1.0, self.clip / max(tree.norm(part.tree), 1e-300))
            parts[name] = replace(part, tree=tree.scale(part.tree, factor), wire_format=DENSE)
        return replace(update, parts=parts), memory


@dataclass(frozen=True)
class ClipDelta(Clip):
    takes: ClassVar[frozenset[str]] = frozenset({"delta"})


@dataclass(frozen=True)
class EarlyClip(Clip):
    bracket: ClassVar[Bracket] = Bracket.MEANING


@dataclass(frozen=True)
class Flip(Stage):
    """An attack that keeps the norm."""

    bracket: ClassVar[Bracket] = Bracket.ADVERSARY
    norm: ClassVar[Norm] = Norm.KEEPS

    def encode(self, update, scratch, memory, local):
        return update, memory


@dataclass(frozen=True)
class Boost(Flip):
    norm: ClassVar[Norm] = Norm.FREE


@dataclass(frozen=True)
class Grid(Stage):
    """Rounds to integers."""

    bracket: ClassVar[Bracket] = Bracket.WIRE
    norm: ClassVar[Norm] = Norm.GROWS
    integers: ClassVar[bool] = True


@dataclass(frozen=True)
class Product(Stage):
    reshapes: ClassVar[bool] = True
    unequal: ClassVar[bool] = True


@dataclass(frozen=True)
class Turn(Stage):
    """Writes the factors in another basis; `delta` stays what it is."""

    rebases: ClassVar[bool] = True


@dataclass(frozen=True)
class TurnWhole(Turn):
    """What stands behind it works on another shape."""

    reshapes: ClassVar[bool] = True


@dataclass(frozen=True)
class Away(Stage):
    """Takes the factors out of the delta."""

    reshapes: ClassVar[bool] = True
    makes: ClassVar[frozenset[str]] = frozenset({"rows"})


@dataclass(frozen=True)
class Blocks(Stage):
    shows_each: ClassVar[bool] = True


@dataclass(frozen=True)
class Distil(Stage):
    takes: ClassVar[frozenset[str]] = frozenset({"logits"})


@dataclass(frozen=True)
class Second(Stage):
    """A second maker of what SCAFFOLD makes."""

    makes: ClassVar[frozenset[str]] = frozenset({"control"})


@dataclass(frozen=True)
class Late(Stage):
    bracket: ClassVar[Bracket] = Bracket.WIRE
    norm: ClassVar[Norm] = Norm.KEEPS
    makes: ClassVar[frozenset[str]] = frozenset({"late"})


@dataclass(frozen=True)
class Secret(Aggregator):
    secret: ClassVar[bool] = True


@dataclass(frozen=True)
class Median(Secret):
    sees: ClassVar = "each"


@dataclass(frozen=True)
class Integers(Secret):
    needs_integers: ClassVar[bool] = True


@dataclass(frozen=True)
class Logits(Work):
    makes: ClassVar[frozenset[str]] = frozenset({"delta", "logits"})


@dataclass(frozen=True)
class NoFigures(Work):
    makes: ClassVar[frozenset[str]] = frozenset({"delta"})


SGD = Sgd(steps=1)
SECRET = Demands(secrecy=True)
PLAIN = Experiment(task=Task("tiny-llama"), federation=Shards("quickstart"), work=SGD, stages=(ByExamples(),))


def experiment(*stages: Stage, **settings) -> Experiment:
    return replace(PLAIN, stages=stages, **settings)


def of(*stages: Stage, share: str = "*", **settings) -> Experiment:
    return experiment(*stages, task=Task("tiny-llama", scope=Scope(share=(share,))), **settings)


# rule: (refused, what the message names, the relative that passes)
RULES = {
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
        "keep stands after prox, which would then see what must not leave the client; put keep first",
        of(Keep(("*lora_B",)), Prox(), Uniform()),
    ),
    "two that are first": (
        of(Momentum(), Keep(("*A",)), ByExamples(), share="*lora_A"),
        "keep stands after momentum",
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
        "clip bounds what one client can change, but by_examples lets some clients change more",
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
        "boost comes after clip, which bounds the norm of an update, and does not say by how much it may grow it",
        of(COHORT, Clip(), Flip(), Quantize(bits=4)),
    ),
    "an error feedback undoes a clip": (
        of(EarlyClip(), TopK(0.5), Uniform()),
        "top_k comes after early_clip",
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
        "quantize comes after grid, which yields integers, and would make fractions of them",
        of(COHORT, Quantize(bits=8), Grid()),
    ),
    "integers for who adds them": (
        of(COHORT, Quantize(bits=8), aggregator=Integers()),
        r"aggregator: integers adds integers, but the innermost stage \(quantize\) yields fractions",
        of(COHORT, Grid(), aggregator=Integers()),
    ),
    "secrecy: who sees each": (
        of(Uniform(), demands=SECRET, aggregator=Median()),
        "demands.secrecy: aggregator median works on each client's update",
        of(Uniform(), demands=SECRET, aggregator=Secret()),
    ),
    "secrecy: a plain sum": (
        of(Uniform(), demands=SECRET),
        "demands.secrecy: aggregator sum adds up updates that the server can read one by one",
        of(Uniform()),
    ),
    "secrecy: a sum that shows each": (
        of(Blocks(), Uniform(), demands=SECRET, aggregator=Secret()),
        "demands.secrecy: aggregator secret shows sums alone, but a sum of what blocks makes shows every client's own",
        of(Blocks(), Uniform(), aggregator=Secret()),
    ),
    "kept leaves and another shape": (
        of(Keep(("*A",)), Product(), Uniform()),
        "keep keeps leaves on the client, but product turns the update into another shape",
        of(Product(), Uniform()),
    ),
    "a shared scope and another shape": (
        of(Product(), Uniform(), share="*lora_A"),
        r"keep keeps leaves on the client \(task.scope.share asks for it\), but product",
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
        "dyn compares the update with the local steps, but product before it turns the update into another shape",
        of(Dyn(), Product(), Uniform()),
    ),
    "single entries that are gone": (
        of(Prox(), Away(), TopK(0.5), Uniform()),
        r"top_k stands behind away, which takes lora_A and lora_B out of the delta \(into 'rows'\), so that it would",
        of(Prox(), TopK(0.5), Away(), Uniform()),
    ),
    "a clip behind FedDyn": (
        of(Dyn(), COHORT, Clip()),
        "control term of dyn is the sum of its clients' only if .*, but clip behind it changes the update",
        of(Dyn(), COHORT, Flip()),
    ),
    "momentum of products": (
        of(LoraProduct("product"), Momentum(), Uniform()),
        "momentum works on how far clients have moved, but lora_product with form: product .*; set .* to form: update",
        of(LoraProduct(), Momentum(), Uniform()),
    ),
    "a clip of products": (
        of(LoraProduct("product"), EarlyClip(), Uniform()),
        "early_clip works on how far clients have moved, but lora_product",
        of(LoraProduct("product"), Uniform()),
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
    check(of(Keep(("*A",)), Adam(), Prox(), TopK(0.5), COHORT, Clip(), Quantize(bits=1), Grid(), aggregator=Integers()))


@pytest.mark.parametrize("noun", [Stage, Aggregator, Work])
def test_messages_name_components_as_files_do(noun):
    for name, cls in NOUNS[noun].items():
        assert _name(cls.__new__(cls)) == name


PLAIN_RANK, LOW_RANK = Profile(), Profile(rank=4)


LORA = Lora(rank=8)


def ranked(*stages: Stage, adapter=LORA) -> Experiment:
    return experiment(*stages, task=Task("tiny-llama", adapter=adapter))


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        (ranked(Uniform()), "client b has rank 4, but task.adapter is lora of rank 8, and the part 'delta'"),
        (ranked(Product(), Scaffold(), Uniform()), "rank 4, .* scaffold makes the part 'control' in the shape"),
        (ranked(Uniform(), adapter=Full()), "client b has rank 4, but .* is full, whose leaves have one shape"),
        (ranked(Dyn(), LoraPad(), Uniform()), "rank 4, .* dyn is right only if every client counts the same in each"),
    ],
)  # fmt: skip
def test_mixed_ranks_need_an_update_of_one_shape(refused, message):
    with pytest.raises(CheckError, match=message):
        check_ranks(refused, {"a": PLAIN_RANK, "b": LOW_RANK})


def test_ranks_that_are_the_adapters_or_brought_to_one_shape_pass():
    check_ranks(ranked(Uniform()), {"a": PLAIN_RANK, "b": Profile(rank=8)})
    check_ranks(ranked(Scaffold(), Uniform()), {"a": PLAIN_RANK, "b": Profile(rank=8)})
    check_ranks(ranked(Product(), Uniform()), {"a": PLAIN_RANK, "b": LOW_RANK})
    check_ranks(ranked(Momentum(), LoraPad(), Uniform()), {"a": PLAIN_RANK, "b": LOW_RANK})
    check_ranks(ranked(Dyn(), LoraPad(), Uniform()), {"a": PLAIN_RANK, "b": Profile(rank=8)})
    check_ranks(ranked(Uniform(), adapter=Full()), {"a": PLAIN_RANK})


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
        any(a.bracket > b.bracket for a, b in pairwise(order)) or order[0] is not keep for order in wrong
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
