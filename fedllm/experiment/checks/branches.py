"""Rules of adapters with several branches, and of work in phases."""

from __future__ import annotations

from fedllm.errors import CheckError, config_name, nearest
from fedllm.experiment.record import Experiment
from fedllm.models.adapters.multi_lora import MultiLora
from fedllm.stages.base import Stage
from fedllm.stages.personalization.keep import Keep
from fedllm.stages.personalization.personal_last import PersonalLast
from fedllm.tensors.tree import matches


def check_branches(experiment: Experiment) -> None:
    """
    Raises:
        CheckError: a stage works on a branch that is not there or that nothing keeps; phases beside a work that
            accounts for one pass.
    """
    adapter, work = experiment.task.adapter, experiment.work
    if experiment.task.scope.phases and work.per_example:
        raise CheckError(
            f"task.scope.phases trains in several passes, but work {config_name(work)} accounts for one pass a round; "
            "use a method without phases, or privacy for each client (gaussian_dp)"
        )
    if not isinstance(adapter, MultiLora):
        return
    kept = [pattern for stage in experiment.pipeline if isinstance(stage, Keep) for pattern in stage.patterns]
    for stage in experiment.stages:
        if stage.traits.adapter == "multi_lora":
            _check_stage(stage, adapter, kept)
        if isinstance(stage, PersonalLast) and stage.rounds >= experiment.rounds > 1:
            raise CheckError(
                f"stages: personal_last.rounds is {stage.rounds} of {experiment.rounds} rounds, so that nothing shared "
                "would train; lower it, or run more rounds"
            )


def _check_stage(stage: Stage, adapter: MultiLora, kept: list[str]) -> None:
    name, settings = config_name(stage), vars(stage)
    for field in ("own", "shared", "rest"):
        branch = settings.get(field, adapter.branches[0])
        if branch not in adapter.branches:
            raise CheckError(
                f"stages: {name}.{field} is '{branch}', but task.adapter.multi_lora has the branches "
                f"{', '.join(adapter.branches)}{nearest(branch, adapter.branches)}"
            )
    own = settings["own"]
    if not matches(f"layer.{own}.lora_A", kept):
        raise CheckError(
            f"stages: {name} works on the branch {own}, which stays with its client, but nothing keeps it; put "
            f'keep: ["*.{own}.*"] behind {name}'
        )
