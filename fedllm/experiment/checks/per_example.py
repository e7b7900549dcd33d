"""What a work that clips the gradient of each example (`Work.per_example`) does not go with.

objective   an example's loss depends on its own tokens alone
adapter     its tensors have one gradient for each example, from a stack whose clients are the examples
"""

from __future__ import annotations

from fedllm.errors import CheckError, config_name
from fedllm.experiment.record import Experiment


def check_per_example(experiment: Experiment) -> None:
    """Refuse what would void the bound on one example; nothing to say of other works.

    Raises:
        CheckError: an objective that couples examples, or an adapter that cannot be stacked, such as `full`, which
            trains embeddings that are tied to the output head.
    """
    work, task = experiment.work, experiment.task
    if not work.per_example:
        return
    own = f"work {config_name(work)} clips the gradient of each example by itself, but"
    if task.objective.couples_examples:
        raise CheckError(
            f"{own} task.objective {config_name(task.objective)} makes the loss of one depend on the others of its "
            "batch; use an objective that takes each example alone, such as sft"
        )
    if not task.adapter.stackable:
        raise CheckError(
            f"{own} task.adapter {config_name(task.adapter)} has one gradient for a whole batch (its tensors are the "
            "model's own, or peft's, and may be tied to others); use an adapter that can be stacked, such as lora"
        )
