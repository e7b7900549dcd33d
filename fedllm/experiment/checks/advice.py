"""What is hardly meant, although it can be run: one sentence each, for `fedllm check` and the log of a run."""

from __future__ import annotations

from fedllm.data.federation import Population
from fedllm.experiment.record import Experiment
from fedllm.models.base_models.load import emulates_bfloat16, resolve_device


def advice(experiment: Experiment, population: Population) -> list[str]:
    """All that there is to say of an experiment and its clients."""
    found = [_idle(experiment, population), _slow(experiment), _nothing_held_out(experiment, population)]
    return [text for text in found if text]


def _idle(experiment: Experiment, population: Population) -> str:
    """No client trains."""
    profiles = map(experiment.federation.profile, population.clients)
    reasons = {experiment.work.for_profile(profile).idle for profile in profiles}
    if not reasons or "" in reasons:
        return ""
    return f"{sorted(reasons)[0]}: nothing is trained, and the model stays as it is"


def _slow(experiment: Experiment) -> str:
    """Arithmetic that the device has no instructions for."""
    if experiment.task.dtype != "bfloat16" or not emulates_bfloat16(resolve_device(experiment.task.device)):
        return ""
    return (
        "task.dtype is bfloat16, for which this device has no instructions of its own: it is emulated, and much slower "
        "than float32; set task.dtype to auto or float32"
    )


def _nothing_held_out(experiment: Experiment, population: Population) -> str:
    """Figures that were asked for, and nothing to measure them on."""
    asked, compared = experiment.evaluation.metrics, experiment.evaluation.compare
    if any(map(len, population.heldout.values())) or not asked:
        return ""
    rest = f", and {' and '.join(compared)} cannot be compared" if compared else ""
    return f"no record is held out: nothing is evaluated{rest}; set federation.shards.heldout"
