"""Every rule that can be decided before a model loads. Each refusal names both sides and the reason.

brackets    MEANING, WEIGH, PRIVATE, ADVERSARY, WIRE, in this order; what keeps leaves on the client stands first
weights     one stage weighs; all clients the same where a method or a bound rests on it
parts       made once, taken by somebody, taken only behind the stage that makes them
bounds      what is bounded stays bounded, and holds every part
integers    what yields them stands last, and is there if the aggregator adds integers
secrecy     the server is shown sums, and no sum from which one client's update can be read
shapes      what changes the shape or the basis of an update goes with what rests on it: see `check_shapes`
bandwidth   what fits an update to its client's bandwidth stands last, and is there if a client has one
optimisers  control terms go with the local rule that they are derived for
controls    control terms are computed from the update as the local steps made it: see `check_controls`
quantised   matrices that are kept in few bits stay as they are
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from fedllm.errors import CheckError
from fedllm.errors import config_name as _name
from fedllm.experiment.checks.controls import check_controls
from fedllm.experiment.checks.shapes import check_shapes
from fedllm.experiment.record import Experiment
from fedllm.messages.context import Profile
from fedllm.models.adapters.lora import Lora
from fedllm.stages.base import Bracket, Norm, Stage

NO_SECRECY = "no aggregator that comes with fedllm hides them, so set demands.secrecy to false"
OWN_PARTS = frozenset({"delta", "metrics", "counts"})  # what the loop itself takes


def check(experiment: Experiment) -> None:
    """Refuse an experiment that cannot be right.

    Raises:
        CheckError: the first rule that is broken.
    """
    stages = experiment.pipeline
    _brackets(stages)
    _first(stages)
    _weights(stages, _weigher(stages))
    _parts(experiment)
    _norms(stages)
    _bounded_parts(experiment)
    _integers(experiment)
    _secrecy(experiment)
    check_shapes(experiment)
    check_controls(stages)
    _capped(stages)
    _optimizers(experiment)
    _quantised(experiment)


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
    check_ranks(experiment, profiles)
    client, bandwidth = next(((c, p.bandwidth) for c, p in profiles.items() if p.bandwidth is not None), ("", None))
    if bandwidth is None:
        return
    capped = f"federation: client {client} has a bandwidth of {bandwidth} bytes a round, but"
    if not any(stage.caps for stage in experiment.pipeline):
        raise CheckError(
            f"{capped} no stage fits its updates to it; use method haflq, add the stage lora_cap, or leave bandwidth "
            "out"
        )
    for stage in experiment.pipeline:
        if stage.needs_equal:
            raise CheckError(
                f"{capped} {_name(stage)} is right only if every client counts the same in each component; leave out "
                "one of the two"
            )


def check_ranks(experiment: Experiment, profiles: Mapping[str, Profile]) -> None:
    """Refuse clients of another rank than the adapter's where an update has the shape of the parameters.

    Args:
        profiles: by client, as `Federation.profile` gives them.

    Raises:
        CheckError: names the client, both ranks and the stage or part.
    """
    adapter = experiment.task.adapter
    rank = adapter.rank if isinstance(adapter, Lora) else None
    others = {name: profile.rank for name, profile in profiles.items() if profile.rank not in (None, rank)}
    if not others:
        return
    client, own = next(iter(others.items()))
    mixed = f"federation: client {client} has rank {own}, but task.adapter is {_name(adapter)}"
    mixed += f" of rank {rank}" if rank is not None else ", whose leaves have one shape on all clients"
    if rank is not None and (above := [name for name, other in others.items() if other is not None and other > rank]):
        raise CheckError(
            f"federation: client {above[0]} has rank {others[above[0]]}, above the rank {rank} of task.adapter; raise "
            "task.adapter.lora.rank, or lower the client's"
        )
    if rank is None or not any(stage.unequal for stage in experiment.pipeline):
        raise CheckError(
            f"{mixed}, and the part 'delta' has the shape of the parameters, so that their updates cannot be added; "
            "give all clients the adapter's rank, or add a stage that brings updates to one shape, as lora_pad does"
        )
    assert isinstance(adapter, Lora)
    if adapter.init == "singular":
        raise CheckError(
            f"{mixed}, and its init is singular: a client of another rank would lack singular values that the frozen "
            "weights have given up; give all clients the adapter's rank, or use init: zero"
        )
    if experiment.task.scope.freeze:
        raise CheckError(f"{mixed}, and task.scope.freeze holds leaves at the adapter's rank; leave it out")
    for stage in experiment.pipeline:
        if stage.first:
            raise CheckError(f"{mixed}, and {_name(stage)} keeps leaves of the adapter's rank; leave it out")
        if stage.needs_equal:
            raise CheckError(
                f"{mixed}, and {_name(stage)} is right only if every client counts the same in each component; give "
                "all clients the adapter's rank"
            )
        if stage.makes and not stage.unequal:
            part = sorted(stage.makes)[0]
            raise CheckError(f"{mixed}, and {_name(stage)} makes the part '{part}' in the shape of the parameters")


def _brackets(stages: Sequence[Stage]) -> None:
    for before, after in pairwise(stages):
        if before.bracket > after.bracket:
            raise CheckError(
                f"stages: {_name(after)} ({after.bracket.name}) stands after {_name(before)} ({before.bracket.name}); "
                f"put it before, for stages run in the order {', '.join(bracket.name for bracket in Bracket)}"
            )


def _first(stages: Sequence[Stage]) -> None:
    for place, stage in enumerate(stages):
        if stage.first and any(not other.first for other in stages[:place]):
            raise CheckError(
                f"stages: {_name(stage)} stands after {_name(stages[place - 1])}, which would then see what must not "
                f"leave the client; put {_name(stage)} first"
            )


def _weigher(stages: Sequence[Stage]) -> Stage:
    weighers = [stage for stage in stages if stage.bracket is Bracket.WEIGH]
    if len(weighers) != 1:
        found = " and ".join(map(_name, weighers)) or "none"
        raise CheckError(f"stages: exactly one stage must weigh the clients (by_examples or uniform); found {found}")
    return weighers[0]


def _weights(stages: Sequence[Stage], weigher: Stage) -> None:
    own = next((stage for stage in stages if stage.own_weights), None)
    if weigher.fixed_denominator:
        _over_the_drawn(stages, weigher)
    for stage in stages:
        if own is not None and (stage.needs_equal or _bounds(stage)):
            raise CheckError(
                f"stages: {_name(stage)} is right only if every client weighs the same, but {_name(own)} gives each a "
                "weight of its own; leave out one of the two"
            )
        if stage.needs_equal and not weigher.equal:
            raise CheckError(
                f"stages: {_name(stage)} is right only if every client weighs the same, but {_name(weigher)} weighs "
                "them differently; use uniform"
            )
        if not _bounds(stage):
            continue
        if not weigher.equal:
            raise CheckError(
                f"stages: {_name(stage)} bounds what one client can change, but {_name(weigher)} lets some clients "
                "change more than others; use uniform with denominator: cohort"
            )
        if not weigher.fixed_denominator:
            raise CheckError(
                f"stages: {_name(stage)} bounds what one client can change, but {_name(weigher)} divides by a number "
                "that depends on who answered; set its denominator: cohort"
            )


def _over_the_drawn(stages: Sequence[Stage], weigher: Stage) -> None:
    """What a denominator that counts lost clients does not go with."""
    for stage in stages:
        if stage.own_weights:
            raise CheckError(
                f"stages: {_name(weigher)} divides by the number of clients that were drawn, but {_name(stage)} gives "
                "each client a weight of its own, and nobody knows that of a lost client; set the denominator of "
                f"{_name(weigher)} to answered"
            )
        if stage.over_answered:
            raise CheckError(
                f"stages: {_name(weigher)} divides by the number of clients that were drawn, but {_name(stage)} with "
                "mean: contributors divides by the weights of those who answered; set the denominator of "
                f"{_name(weigher)} to answered, or leave out mean: contributors"
            )


def _parts(experiment: Experiment) -> None:
    makers = dict.fromkeys(experiment.work.makes, _name(experiment.work))
    taken = set(OWN_PARTS)
    for stage in experiment.pipeline:
        for part in sorted(stage.takes - makers.keys()):
            raise CheckError(
                f"stages: {_name(stage)} takes the part '{part}', which nothing before it makes (made so far: "
                f"{', '.join(sorted(makers))})"
            )
        for part in sorted(stage.makes & makers.keys()):
            raise CheckError(f"stages: {_name(stage)} makes the part '{part}', which {makers[part]} makes already")
        makers |= dict.fromkeys(stage.makes, _name(stage))
        taken |= stage.takes | stage.makes  # a stage's own decode takes what it makes
    for part in sorted(makers.keys() - taken):
        raise CheckError(f"{makers[part]} makes the part '{part}', which no stage takes; add the stage that does")


def _norms(stages: Sequence[Stage]) -> None:
    bound: Stage | None = None
    for stage in stages:
        # The weigher multiplies what its own decode divides; equal weights are a rule of their own.
        changes = type(stage).encode is not Stage.encode and stage.bracket is not Bracket.WEIGH
        if bound is not None and changes and stage.norm is Norm.FREE:
            raise CheckError(
                f"stages: {_name(stage)} comes after {_name(bound)}, which bounds the norm of an update, and does not "
                f"say by how much it may grow it; put it before {_name(bound)}"
            )
        if stage.norm is Norm.BOUNDS:
            bound = stage


def _bounded_parts(experiment: Experiment) -> None:
    bound: Stage | None = None
    made = dict.fromkeys(experiment.work.makes, _name(experiment.work))
    for stage in experiment.pipeline:
        if bound is not None and stage.makes:
            part = sorted(stage.makes)[0]
            raise CheckError(
                f"stages: {_name(stage)} makes the part '{part}' after {_name(bound)}, which could not bound it; "
                f"put it before {_name(bound)}"
            )
        made |= dict.fromkeys(stage.makes, _name(stage))
        if _bounds(stage):
            bound = stage
            for part in sorted(made.keys() - stage.takes):
                raise CheckError(
                    f"stages: {_name(stage)} bounds what one client can change, but not the part '{part}' that "
                    f"{made[part]} makes; leave {made[part]} out, or use a stage that takes '{part}' too"
                )


def _integers(experiment: Experiment) -> None:
    whole: Stage | None = None
    for stage in experiment.pipeline:
        if whole is not None and not stage.integers:
            raise CheckError(
                f"stages: {_name(stage)} comes after {_name(whole)}, which yields integers, and would make fractions "
                f"of them; put it before {_name(whole)}"
            )
        whole = stage if stage.integers else whole
    if experiment.aggregator.needs_integers and whole is None:
        raise CheckError(
            f"aggregator: {_name(experiment.aggregator)} adds integers, but the innermost stage "
            f"({_name(experiment.pipeline[-1])}) yields fractions; put a stage that rounds last"
        )


def _secrecy(experiment: Experiment) -> None:
    if not experiment.demands.secrecy:
        return
    name = _name(experiment.aggregator)
    if experiment.aggregator.sees == "each":
        raise CheckError(f"demands.secrecy: aggregator {name} works on each client's update; {NO_SECRECY}")
    if not experiment.aggregator.secret:
        raise CheckError(
            f"demands.secrecy: aggregator {name} adds up updates that the server can read one by one; {NO_SECRECY}"
        )
    for stage in experiment.pipeline:
        if stage.shows_each:
            raise CheckError(
                f"demands.secrecy: aggregator {name} shows sums alone, but a sum of what {_name(stage)} makes shows "
                f"every client's own block; leave out {_name(stage)}"
            )


def _capped(stages: Sequence[Stage]) -> None:
    cap: Stage | None = None
    for stage in stages:
        if cap is not None and type(stage).encode is not Stage.encode:
            raise CheckError(
                f"stages: {_name(stage)} comes after {_name(cap)}, which fits the update to a bandwidth, and would "
                f"change its size; put it before {_name(cap)}, or leave it out"
            )
        cap = stage if stage.caps else cap


def _optimizers(experiment: Experiment) -> None:
    for stage in experiment.pipeline:
        if stage.optimizers is not None and experiment.work.rule not in stage.optimizers:
            rule = experiment.work.rule
            raise CheckError(
                f"stages: {_name(stage)} is derived for plain SGD, but work uses {rule}: its control terms would be in "
                f"other units than the local steps; set work to plain sgd, or permit it with {_name(stage)}: "
                f"{{allow: [{rule}]}}"
            )


def _quantised(experiment: Experiment) -> None:
    task = experiment.task
    if task.quantize is None:
        return
    held = f"task.quantize holds the base model's matrices in {task.quantize}, but"
    if task.adapter.needs_weights:
        own = " with init: singular" if isinstance(task.adapter, Lora) else ""
        raise CheckError(f"{held} adapter {_name(task.adapter)}{own} changes them; leave out one of the two")
    for stage in experiment.pipeline:
        if stage.shifts:
            raise CheckError(f"{held} {_name(stage)} adds to them; leave out one of the two")


def _bounds(stage: Stage) -> bool:
    """True if a privacy claim rests on the stage's bound."""
    return stage.bracket is Bracket.PRIVATE and stage.norm is Norm.BOUNDS
