"""Every rule that can be decided before a model loads. Each refusal names both sides, the reason and what to do.

brackets    LOCAL, MEANING, WEIGH, PRIVATE, ADVERSARY, WIRE, in this order
weights     one stage weighs
parts       made once, taken by somebody, taken only behind the stage that makes them; what is bounded holds every part
adapter     a stage that works on one adapter has it
branches    of a personal and a shared one, both are there and the first is kept (`branches`)
optimisers  control terms go with the local rule that they are derived for
integers    a stage that makes them goes with its neighbours and with the aggregator (`secrecy`)
examples    a work that clips each example goes with what takes each by itself (`per_example`)
facts       what one needs, no other loses: the table in `rules`
clients     a quorum that there can be; ranks that are not above the adapter's; and the table again
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from fedllm.errors import CheckError, config_name
from fedllm.experiment.checks.branches import check_branches
from fedllm.experiment.checks.parties import Party, client, parties
from fedllm.experiment.checks.per_example import check_per_example
from fedllm.experiment.checks.privacy import check_promise
from fedllm.experiment.checks.rules import conflicts
from fedllm.experiment.checks.secrecy import check_cohorts, check_integers
from fedllm.experiment.record import Experiment
from fedllm.messages.context import Profile
from fedllm.messages.traits import Bracket, Fact
from fedllm.models.adapters.lora import Lora

OWN_PARTS = frozenset({"delta", "metrics", "counts"})  # what the loop itself takes


def check(experiment: Experiment) -> None:
    """Refuse an experiment that cannot be right.

    Raises:
        CheckError: the first rule that is broken.
    """
    everyone = parties(experiment)
    stages = [party for party in everyone if party.key == "stages"]
    _brackets(stages)
    _weigher(stages)
    _parts(experiment, stages)
    _adapter(experiment, stages)
    check_branches(experiment)
    check_per_example(experiment)
    for conflict in conflicts(everyone):
        raise CheckError(str(conflict))
    _optimizers(experiment, stages)
    check_integers(experiment)
    check_promise(experiment)


def check_profiles(experiment: Experiment, profiles: Mapping[str, Profile]) -> None:
    """Refuse clients that are too few for the experiment, or whose devices it does not suit.

    Args:
        profiles: of all clients, as `Federation.profile` gives them.

    Raises:
        CheckError: names the client, what its profile says, and what it does not go with.
    """
    quorum, most = experiment.limits.quorum, experiment.federation.largest_cohort(len(profiles))
    if quorum > max(most, 1):
        raise CheckError(
            f"limits.quorum is {quorum}, but a round asks {most} of {len(profiles)} clients at most, so that every "
            f"round would be empty; set limits.quorum to {most} or less"
        )
    if profiles:
        check_cohorts(experiment, len(profiles))
    adapter = experiment.task.adapter
    for name, profile in profiles.items():
        if isinstance(adapter, Lora) and profile.rank is not None and profile.rank > adapter.rank:
            raise CheckError(
                f"federation: client {name} has rank {profile.rank}, above the rank {adapter.rank} of task.adapter; "
                f"raise task.adapter.{config_name(adapter)}.rank, or lower the client's"
            )
    found = [client(name, profile, experiment.task) for name, profile in profiles.items()]
    odd = {party.traits.needs: party for party in reversed(found) if party.traits.needs}  # the first of each kind
    if not odd:
        return
    for conflict in conflicts([*parties(experiment), *odd.values()]):
        if {conflict.needer, conflict.loser} & set(odd.values()):
            raise CheckError(str(conflict))


def _brackets(stages: Sequence[Party]) -> None:
    for before, after in pairwise(stages):
        if before.traits.bracket > after.traits.bracket:
            raise CheckError(
                f"stages: {after.name} ({after.traits.bracket.name}) stands after {before.name} "
                f"({before.traits.bracket.name}); put it before, for stages run in the order "
                f"{', '.join(bracket.name for bracket in Bracket)}"
            )


def _weigher(stages: Sequence[Party]) -> None:
    weighers = [stage.name for stage in stages if stage.traits.bracket is Bracket.WEIGH]
    if len(weighers) != 1:
        found = " and ".join(weighers) or "none"
        raise CheckError(f"stages: exactly one stage must weigh the clients (by_examples or uniform); found {found}")


def _parts(experiment: Experiment, stages: Sequence[Party]) -> None:
    makers = dict.fromkeys(experiment.work.traits.makes, config_name(experiment.work))
    taken, bound = set(OWN_PARTS), ""
    for stage in stages:
        name, takes, makes = stage.name, stage.traits.takes, stage.traits.makes
        for part in sorted(takes - makers.keys()):
            raise CheckError(
                f"stages: {name} takes the part '{part}', which nothing before it makes (made so far: "
                f"{', '.join(sorted(makers))})"
            )
        for part in sorted(makes):
            if part in makers:
                raise CheckError(f"stages: {name} makes the part '{part}', which {makers[part]} makes already")
            if bound:
                raise CheckError(
                    f"stages: {name} makes the part '{part}' after {bound}, which could not bound it; put it before "
                    f"{bound}"
                )
        makers |= dict.fromkeys(makes, name)
        takes |= stage.traits.may_take
        taken |= takes | makes  # a stage's own decode takes what it makes
        if Fact.FIXED_DENOMINATOR in stage.traits.needs:  # a privacy claim rests on its bound
            bound = name
            for part in sorted(makers.keys() - takes - makes):
                raise CheckError(
                    f"stages: {name} bounds what one client can change, but not the part '{part}' that "
                    f"{makers[part]} makes; leave {makers[part]} out, or use a stage that takes '{part}' too"
                )
    for part in sorted(makers.keys() - taken):
        raise CheckError(f"{makers[part]} makes the part '{part}', which no stage takes; add the stage that does")


def _adapter(experiment: Experiment, stages: Sequence[Party]) -> None:
    own = config_name(experiment.task.adapter)
    for stage in stages:
        if stage.traits.adapter not in (None, own):
            wanted = stage.traits.adapter
            raise CheckError(
                f"stages: {stage.name} works on the adapter {wanted}, but task.adapter is {own}; use {wanted}"
            )


def _optimizers(experiment: Experiment, stages: Sequence[Party]) -> None:
    rule = experiment.work.rule
    for stage in stages:
        if stage.traits.optimizers is not None and rule not in stage.traits.optimizers:
            raise CheckError(
                f"stages: {stage.name} is derived for plain SGD, but work uses {rule}: its control terms would be in "
                f"other units than the local steps; set work to plain sgd, or permit it with {stage.name}: "
                f"{{allow: [{rule}]}}"
            )
