"""What would make a privacy guarantee void, refused before a model loads: each with the reason and the remedy.

The table of rules has what concerns the order of stages: weights, denominators, parts that nothing bounds, and stages
behind the bound that could grow it. Here is what needs the demands, the evaluation, the sampler or the clients.
"""

from __future__ import annotations

from collections.abc import Mapping

from fedllm.errors import CheckError, config_name, counted
from fedllm.evaluation.settings import Evaluation
from fedllm.experiment.privacy import PrivacyPlan, calibrated, mechanism_of, plan_of
from fedllm.experiment.record import Experiment, Limits, PrivacyDemand
from fedllm.privacy.schemes import EveryRound, FixedSizeScheme, PoissonScheme, RotationScheme
from fedllm.stages.privacy.base import PrivateStage
from fedllm.stages.privacy.dp_ftrl import DpFtrl
from fedllm.stages.weighting.uniform import Uniform
from fedllm.training.base import Work
from fedllm.training.dp_sgd import DpSgd


def check_promise(experiment: Experiment) -> None:
    """Refuse what no number of clients could mend.

    Raises:
        CheckError: the first rule that is broken.
    """
    stages = [stage for stage in experiment.stages if isinstance(stage, PrivateStage)]
    demand, mechanism = experiment.demands.privacy, mechanism_of(experiment)
    if len(stages) > 1:
        raise CheckError(
            f"stages: {config_name(stages[0])} and {config_name(stages[1])} both bound and noise the updates; keep one"
        )
    if demand is not None and mechanism is None:
        raise CheckError(
            "demands.privacy is set, but nothing adds noise; add the stage gaussian_dp, dp_ftrl or local_gaussian, or "
            "use the work dp_sgd"
        )
    if mechanism is None:
        return
    _noise(mechanism, demand)
    _noise_of_work(mechanism, experiment.work)
    _quorum(mechanism, experiment.limits)
    _in_the_clear(experiment.evaluation)


def _noise(mechanism: PrivateStage | DpSgd, demand: PrivacyDemand | None) -> None:
    """There is noise, and a number that says how much."""
    of_clients = isinstance(mechanism, PrivateStage)
    name, key = config_name(mechanism), "stages" if of_clients else "work"
    noise = mechanism.noise_multiplier
    target = None if demand is None else demand.target_epsilon
    if noise is None and target is None:
        raise CheckError(
            f"{key}: {name} has no noise_multiplier, and nothing says how much noise is wanted; set it, or set "
            "demands.privacy.target_epsilon"
        )
    if noise == 0 and demand is not None:
        raise CheckError(
            f"demands.privacy is set, but {key}: {name} has noise_multiplier 0, which hides nothing; set it above 0, "
            "or leave it out to reach target_epsilon"
        )
    if demand is not None and demand.unit == "client" and not of_clients:
        raise CheckError(
            f"demands.privacy.unit is client, but {name} protects single examples; set unit to example, or use the "
            "stage gaussian_dp"
        )


def _noise_of_work(mechanism: PrivateStage | DpSgd, work: Work) -> None:
    """Beside a private stage, whose noise the target sets, the work's own noise is given."""
    if mechanism is not work and isinstance(work, DpSgd) and work.noise_multiplier is None:
        raise CheckError(
            f"work: dp_sgd has no noise_multiplier, and demands.privacy.target_epsilon sets that of "
            f"{config_name(mechanism)}; set work.dp_sgd.noise_multiplier, or leave out one of the two"
        )


def _quorum(mechanism: PrivateStage | DpSgd, limits: Limits) -> None:
    """No client decides by its answer whether those of all others count."""
    if isinstance(mechanism, PrivateStage) and mechanism.noised_by == "server" and limits.quorum > 1:
        raise CheckError(
            f"limits.quorum is {limits.quorum}: with one answer fewer those of all others would be dropped, so that "
            f"one client could change more than the clip of {config_name(mechanism)}; leave it out"
        )


def _in_the_clear(evaluation: Evaluation) -> None:
    """Nobody has asked for figures that would leave a client without noise."""
    plain = Evaluation()
    asked = {
        "every": evaluation.every is not None,
        "compare": bool(evaluation.compare),
        "personal": evaluation.personal is not None,
        "metrics": evaluation.metrics not in (plain.metrics, ()),
    }
    if evaluation.private and any(asked.values()):
        key = next(name for name, wanted in asked.items() if wanted)
        raise CheckError(
            f"evaluation.{key} asks for scores on the clients' records, which would leave them in the clear beside a "
            "private model; set evaluation.private to false to have them outside of the guarantee, or leave it out"
        )


def check_privacy(experiment: Experiment, sizes: Mapping[str, int]) -> PrivacyPlan | None:
    """The plan with its noise, after what the sampler and the number of clients can make void.

    Args:
        sizes: examples by client.

    Raises:
        CheckError: the first rule that is broken, or no noise that reaches the target.
    """
    plan = plan_of(experiment, sizes)
    if plan is None:
        return None
    _denominator(plan)
    _separation(plan)
    _ends(plan)
    return calibrated(plan)


def check_secret_draws(plan: PrivacyPlan | None, *, simulated: bool) -> None:
    """Refuse draws that anybody with the experiment file can repeat, where clients are real.

    Raises:
        CheckError: cohorts or noise come from the run's public key outside of a simulation.
    """
    if plan is None or simulated:
        return
    demand = plan.experiment.demands.privacy
    if demand is not None and demand.seeded_noise:
        raise CheckError("demands.privacy.seeded_noise draws noise that anybody can subtract; set it to false")
    if not isinstance(plan.scheme, EveryRound | RotationScheme) or not isinstance(plan.mechanism, PrivateStage):
        raise CheckError(
            f"federation: {plan.name} counts on chance that nobody knows, but cohorts and batches are drawn from the "
            "run's public seed, which every client has; outside of a simulation use sampling all or rotation"
        )


def _denominator(plan: PrivacyPlan) -> None:
    """What divides is fixed before anybody is drawn."""
    for stage in plan.experiment.stages:
        by_cohort = isinstance(stage, Uniform) and stage.denominator == "cohort"
        if by_cohort and isinstance(plan.scheme, PoissonScheme) and isinstance(plan.mechanism, PrivateStage):
            raise CheckError(
                f"stages: {plan.name} bounds what one client can change, but uniform divides by the size of the "
                "cohort, which poisson leaves to chance; set its denominator: expected"
            )


def _ends(plan: PrivacyPlan) -> None:
    """The number of rounds does not tell how many clients took part."""
    limits = plan.experiment.limits
    name = "bytes" if limits.bytes is not None else "seconds" if limits.seconds is not None else ""
    if name and not plan.by_client and isinstance(plan.scheme, PoissonScheme | FixedSizeScheme):
        raise CheckError(
            f"limits.{name} would end the run after a number of rounds that depends on who took part, which "
            f"{plan.name} counts on nobody knowing; leave it out, or use sampling all or rotation"
        )


def _separation(plan: PrivacyPlan) -> None:
    """The sampler keeps the distance that correlated noise counts on."""
    stage = plan.mechanism
    if not isinstance(stage, DpFtrl):
        return
    if not isinstance(plan.scheme, EveryRound | RotationScheme):
        raise CheckError(
            "federation: dp_ftrl counts on rounds between two parts of one client, which chance does not keep; use "
            "sampling rotation, or the stage gaussian_dp"
        )
    kept = plan.scheme.min_separation if isinstance(plan.scheme, RotationScheme) else 1
    if stage.separation > kept:
        raise CheckError(
            f"stages: dp_ftrl.separation is {stage.separation}, but the sampler draws a client again after "
            f"{counted(kept, 'round')}; set separation to {kept}, or draw smaller cohorts"
        )
    rounds = plan.experiment.rounds
    if stage.band is not None and stage.band > max(1, rounds):
        raise CheckError(
            f"stages: dp_ftrl.band is {stage.band}, but the run has {counted(rounds, 'round')}; set band to "
            f"{max(1, rounds)} or less, or leave it out"
        )
