"""The rules about control terms: what a client or the server computes from an update and the local steps together.

before     nothing changes the update between the local steps and the stage that compares it with them
behind     where the server's control term is the sum of the clients', nothing changes the update before the sum, and no
           other stage takes the server's step
"""

from __future__ import annotations

from collections.abc import Sequence

from fedllm.errors import CheckError
from fedllm.errors import config_name as _name
from fedllm.stages.base import Bracket, Stage
from fedllm.stages.round_trip import changes_gradients


def compares(stage: Stage) -> bool:
    """True if a stage changes the local steps, and computes from the update what it does so with."""
    return changes_gradients([stage]) and "delta" in stage.takes


def check_controls(stages: Sequence[Stage]) -> None:
    """
    Raises:
        CheckError: the first rule that is broken.
    """
    for place, stage in enumerate(stages):
        for other in filter(_changes, stages[:place] if compares(stage) else ()):
            way_out = "leave out one of the two" if stage.needs_delta else f"put {_name(other)} behind {_name(stage)}"
            raise CheckError(
                f"stages: {_name(other)} changes the update before {_name(stage)} compares it with the local steps, so "
                f"that its control terms would be wrong; {way_out}"
            )
        if stage.needs_delta:
            _sums(stage, stages[:place], stages[place + 1 :])


def _sums(stage: Stage, before: Sequence[Stage], behind: Sequence[Stage]) -> None:
    for other in (*before, *behind):
        if other.steers:
            raise CheckError(
                f"stages: {_name(stage)} and {_name(other)} each take the server's step, but that of {_name(stage)} is "
                "derived as the only one, so that its control terms would not lead to the optimum; leave out one of "
                "the two"
            )
    for other in behind:
        if _changes(other) and other.bracket is not Bracket.ADVERSARY and not other.caps:
            raise CheckError(
                f"stages: the server's control term of {_name(stage)} is the sum of its clients' only if it is given "
                f"the update as they remember it, but {_name(other)} behind it changes the update; leave out one of "
                "the two"
            )


def _changes(stage: Stage) -> bool:
    """True if a stage's client half changes the values of an update. A weigher's server half undoes what it does; what
    keeps leaves on the client hides them from all others."""
    changes = type(stage).encode is not Stage.encode and not stage.keeps_delta
    return changes and stage.bracket is not Bracket.WEIGH and not stage.first
