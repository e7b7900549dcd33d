"""The rules about the shape and the basis of an update. Each refusal names both sides and the reason.

shapes      kept leaves, and ranks that shrink, need an update of the right shape
factors     what works on both factors of an adapter finds both
bases       what speaks of single entries of the factors finds them in one basis in all rounds
shifts      what joins the frozen weights is what the mean lacks, and no step of a server's own
"""

from __future__ import annotations

from collections.abc import Sequence

from fedllm.errors import CheckError
from fedllm.errors import config_name as _name
from fedllm.experiment.checks.controls import compares
from fedllm.experiment.record import Experiment
from fedllm.models.adapters.lora import Lora
from fedllm.stages.base import Norm, Stage
from fedllm.stages.round_trip import changes_gradients


def check_shapes(experiment: Experiment) -> None:
    """
    Raises:
        CheckError: the first rule that is broken.
    """
    stages = experiment.pipeline
    _shapes(experiment)
    _shrinking(stages)
    _factors(experiment)
    _bases(stages)
    _shifts(stages)


def _shapes(experiment: Experiment) -> None:
    asked = " (task.scope.share asks for it)" if experiment.pipeline != experiment.stages else ""
    for keeper in (stage for stage in experiment.pipeline if stage.first):
        for stage in experiment.pipeline:
            if stage.reshapes:
                raise CheckError(
                    f"stages: {_name(keeper)} keeps leaves on the client{asked}, but {_name(stage)} turns the update "
                    "into another shape that needs them; leave out one of the two"
                )
            if stage.both_factors:
                raise CheckError(
                    f"stages: {_name(keeper)} keeps leaves on the client{asked}, but {_name(stage)} works on both "
                    "factors of every layer; leave out one of the two"
                )
    reshaping: Stage | None = None
    for stage in experiment.pipeline:
        if reshaping is not None and stage.both_factors:
            raise CheckError(
                f"stages: {_name(stage)} works on the factors in the part 'delta', but {_name(reshaping)} takes them "
                "out before it; leave out one of the two"
            )
        reshaping = stage if stage.reshapes else reshaping


def _shrinking(stages: Sequence[Stage]) -> None:
    """Before a stage that shrinks leaves, others encode them at their size of today; behind it, others receive them at
    the size that they had. What fits an update to a bandwidth knows of both, by who holds which component."""
    for place, stage in enumerate(stages):
        if not stage.shrinks:
            continue
        before = [other for other in stages[:place] if type(other).encode is not Stage.encode]
        behind = [other for other in stages[place + 1 :] if _receives(other) and not other.caps]
        for other in (*before, *behind):
            raise CheckError(
                f"stages: {_name(other)} works on leaves of one size, but {_name(stage)} shrinks those of a client; "
                f"put it {'behind' if other in before else 'before'} {_name(stage)}, or leave it out"
            )


def _receives(stage: Stage) -> bool:
    return type(stage).receive is not Stage.receive


def _factors(experiment: Experiment) -> None:
    task = experiment.task
    for stage in experiment.pipeline:
        if stage.of_adapter not in (None, _name(task.adapter)):
            raise CheckError(
                f"stages: {_name(stage)} works on the adapter {stage.of_adapter}, but task.adapter is "
                f"{_name(task.adapter)}; use {stage.of_adapter}"
            )
    for stage in (stage for stage in experiment.pipeline if stage.both_factors):
        if not isinstance(task.adapter, Lora):
            raise CheckError(
                f"stages: {_name(stage)} works on the factors of lora, but task.adapter is "
                f"{_name(task.adapter)}; use lora"
            )
        keeper = next((other for other in experiment.pipeline if other.first), None)
        if keeper is not None:
            raise CheckError(
                f"stages: {_name(stage)} works on both factors of lora, but {_name(keeper)} keeps leaves on the client"
                "; leave out one of the two"
            )
        for key in ("freeze", "alternate"):
            if vars(task.scope)[key]:
                raise CheckError(
                    f"stages: {_name(stage)} works on both factors of lora, but task.scope.{key} lets one of them "
                    "stand still; leave out one of the two"
                )


def _bases(stages: Sequence[Stage]) -> None:
    for place, stage in enumerate(stages):
        _absolute(stage, stages[place + 1 :])
        # What stands behind a stage that reshapes works on another shape, whose basis is its own.
        for other in (stages[:place] if stage.reshapes else stages) if stage.rebases else ():
            if other.needs_basis:
                raise CheckError(
                    f"stages: {_name(other)} is right only while an entry of lora_A or lora_B stands for the same in "
                    f"all rounds, but {_name(stage)} writes their product in another basis after each; leave out one "
                    f"of the two{_or_on_products(stage, other)}"
                )
        for behind in stages[place + 1 :] if stage.reshapes else ():
            if behind.both_factors or behind.unequal:
                raise CheckError(
                    f"stages: {_name(behind)} works on the factors of lora, but {_name(stage)} before it takes them "
                    "out of the delta; leave out one of the two"
                )
            if stage.makes and behind.needs_basis:
                parts = ", ".join(f"'{part}'" for part in sorted(stage.makes))
                raise CheckError(
                    f"stages: {_name(behind)} stands behind {_name(stage)}, which takes lora_A and lora_B out of the "
                    f"delta (into {parts}), so that it would not see them; put it before {_name(stage)}, or leave out "
                    "one of the two"
                )
            if compares(behind):
                raise CheckError(
                    f"stages: {_name(behind)} compares the update with the local steps, but {_name(stage)} before it "
                    "turns the update into another shape; leave out one of the two"
                )


def _absolute(stage: Stage, behind: Sequence[Stage]) -> None:
    """Momentum of values is none of steps, an error that is kept belongs to a step, and a bound would shrink values."""
    for other in behind if stage.absolute else ():
        if other.needs_basis or other.norm is Norm.BOUNDS:
            raise CheckError(
                f"stages: {_name(other)} works on how far clients have moved, but {_name(stage)} with form: product "
                f"before it sends what they came to; set {_name(stage)} to form: update"
            )


def _shifts(stages: Sequence[Stage]) -> None:
    """What joins the frozen weights makes up for what the mean lacks: for the mean, and for one such stage."""
    for place, stage in enumerate(stages):
        for other in stages[:place] if stage.shifts else ():
            if other.steers:
                raise CheckError(
                    f"stages: {_name(other)} takes a step of its own in place of the mean of the factors, but "
                    f"{_name(stage)} behind it adds to the frozen weights what this mean lacks; leave out one of the "
                    f"two{'' if stage.reshapes else f', or put {_name(other)} behind {_name(stage)}'}"
                )


def _or_on_products(stage: Stage, other: Stage) -> str:
    if changes_gradients([other]):  # its local steps are on factors
        return ""
    if stage.reshapes and not stage.makes:
        return f", or put {_name(other)} behind {_name(stage)}"
    return f", or list lora_product in place of {_name(stage)} and before {_name(other)}"
