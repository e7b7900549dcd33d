"""Every rule that can be decided before a model loads. Each refusal names both sides and the reason."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from fedllm.errors import CheckError
from fedllm.experiment import Experiment
from fedllm.stage import Bracket, Norm, Stage

OWN_PARTS = frozenset({"delta", "metrics", "counts"})  # what the loop itself takes


def check(experiment: Experiment) -> None:
    """Refuse an experiment that cannot be right.

    Raises:
        CheckError: the first rule that is broken.
    """
    stages = experiment.trip
    _brackets(stages)
    _weigher(stages)
    _parts(experiment)
    _norms(stages)
    _integers(experiment)
    _secrecy(experiment)
    _shapes(stages)
    _optimizers(experiment)


def _brackets(stages: Sequence[Stage]) -> None:
    for before, after in pairwise(stages):
        if before.bracket > after.bracket:
            raise CheckError(
                f"stages: {_name(after)} ({after.bracket.name}) stands after {_name(before)} ({before.bracket.name}); "
                f"put it before, for stages run in the order {', '.join(bracket.name for bracket in Bracket)}"
            )
    for place, stage in enumerate(stages):
        if stage.first and any(not other.first for other in stages[:place]):
            raise CheckError(
                f"stages: {_name(stage)} stands after {_name(stages[place - 1])}, which would then see what must not "
                f"leave the client; put {_name(stage)} first"
            )


def _weigher(stages: Sequence[Stage]) -> None:
    weighers = [stage for stage in stages if stage.bracket is Bracket.WEIGH]
    if len(weighers) != 1:
        found = " and ".join(map(_name, weighers)) or "none"
        raise CheckError(f"stages: exactly one stage must weigh the clients (by_examples or uniform); found {found}")
    (weigher,) = weighers
    for stage in stages:
        if stage.needs_equal and not weigher.equal:
            raise CheckError(
                f"stages: {_name(stage)} is right only if every client weighs the same, but {_name(weigher)} weighs "
                "them differently; use uniform"
            )
        bounds = stage.bracket is Bracket.PRIVATE and stage.norm is Norm.BOUNDS
        if bounds and not (weigher.equal and weigher.fixed_denominator):
            raise CheckError(
                f"stages: {_name(stage)} bounds what one client can change, but {_name(weigher)} divides by a "
                "number that depends on who answered; use uniform with denominator: cohort"
            )


def _parts(experiment: Experiment) -> None:
    makers = dict.fromkeys(experiment.work.makes, _name(experiment.work))
    taken = set(OWN_PARTS)
    for stage in experiment.trip:
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
        if bound is not None and stage.norm is Norm.FREE:
            raise CheckError(
                f"stages: {_name(stage)} comes after {_name(bound)}, which bounds the norm of an update, and does not "
                f"say by how much it may grow it; put it before {_name(bound)}"
            )
        if stage.norm is Norm.BOUNDS:
            bound = stage


def _integers(experiment: Experiment) -> None:
    whole: Stage | None = None
    for stage in experiment.trip:
        if whole is not None and not stage.integers:
            raise CheckError(
                f"stages: {_name(stage)} comes after {_name(whole)}, which yields integers, and would make fractions "
                f"of them; put it before {_name(whole)}"
            )
        whole = stage if stage.integers else whole
    if experiment.aggregator.needs_integers and whole is None:
        last = _name(experiment.trip[-1]) if experiment.trip else "nothing"
        raise CheckError(
            f"aggregator: {_name(experiment.aggregator)} adds integers, but the innermost stage ({last}) yields "
            "fractions; put a stage that rounds last"
        )


def _secrecy(experiment: Experiment) -> None:
    if not experiment.demands.secrecy:
        return
    name = _name(experiment.aggregator)
    if experiment.aggregator.sees == "each":
        raise CheckError(f"demands.secrecy: aggregator {name} works on each client's update; choose one that sees sums")
    if not experiment.aggregator.secret:
        raise CheckError(f"demands.secrecy: aggregator {name} adds up updates that the server can read one by one")
    for stage in experiment.trip:
        if stage.shows_each:
            raise CheckError(f"demands.secrecy: the sum that {_name(stage)} makes shows every client's own block")


def _shapes(stages: Sequence[Stage]) -> None:
    reshaping = [stage for stage in stages if stage.reshapes]
    for keeper in (stage for stage in stages if stage.first):
        for stage in reshaping:
            raise CheckError(
                f"stages: {_name(keeper)} keeps leaves on the client, but {_name(stage)} turns the update into another "
                "shape that needs them; leave out one of the two"
            )


def _optimizers(experiment: Experiment) -> None:
    rule = experiment.work.rule
    for stage in experiment.trip:
        if stage.optimizers is not None and rule not in stage.optimizers:
            raise CheckError(
                f"stages: {_name(stage)} is derived for plain SGD, but work uses {rule}: its control terms would be in "
                f"other units than the local steps; set work to plain sgd, or permit it with {_name(stage)}: "
                f"{{allow: [{rule}]}}"
            )


def _name(component: object) -> str:
    return type(component).__name__
