"""What a run promises about privacy: in lines that `fedllm check` prints, and as the event that the report reads."""

from __future__ import annotations

from fedllm.errors import counted
from fedllm.events import PrivacyPromised
from fedllm.experiment.privacy import PrivacyPlan, assumptions
from fedllm.messages.traits import Fact
from fedllm.models.adapters.lora import Lora
from fedllm.privacy.schemes import FixedSizeScheme, PoissonScheme, RotationScheme
from fedllm.runs.privacy_ledger import PrivacyLedger, finite
from fedllm.stages.privacy.discrete_noise import DiscreteNoise
from fedllm.stages.privacy.dp_ftrl import DpFtrl
from fedllm.stages.privacy.gaussian_dp import GaussianDp


def promised(ledger: PrivacyLedger, done: int = 0) -> PrivacyPromised:
    """The promise of a run whose noise is set, of whose rounds `done` are over."""
    plan = ledger.plan
    mechanism, demand = plan.mechanism, plan.experiment.demands.privacy
    noise = float(mechanism.noise_multiplier or 0.0)
    found = ledger.promise(done) if noise and plan.experiment.rounds else None
    return PrivacyPromised(
        unit=plan.unit,
        mechanism=plan.name,
        noised_by="client" if plan.by_client else "server",
        epsilon=None if found is None else finite(found.epsilon),
        delta=plan.delta,
        target_epsilon=None if demand is None else demand.target_epsilon,
        noise_multiplier=noise,
        clip=mechanism.clip,
        relation="" if found is None else found.relation,
        accountant="" if found is None else found.accountant,
        sampling=plan.scheme.to_json(),
        simulated=True,
        seeded_noise=demand is not None and demand.seeded_noise,
        in_the_clear=not plan.experiment.evaluation.private,
        adaptive=isinstance(mechanism, GaussianDp) and mechanism.adaptive is not None,
        assumptions=tuple(assumptions(plan)),
    )


def privacy_lines(plan: PrivacyPlan) -> list[tuple[str, str]]:
    """Who is protected against whom, the noise, epsilon after one round and after all; what is hardly meant."""
    rounds, noise = plan.experiment.rounds, plan.mechanism.noise_multiplier
    lines = [("privacy", f"protects {_who(plan)} against {_whom(plan)}"), ("sampling", _sampling(plan))]
    if not noise:
        return [*lines, ("epsilon", "none: noise_multiplier is 0, which hides nobody")]
    one, all_rounds = plan.curve([min(1, rounds), rounds])
    spent = f"{one:.3g} after 1 round, {all_rounds:.3g} after {rounds}" if rounds > 1 else f"{all_rounds:.3g}"
    found = plan.guarantee(rounds)
    lines += [
        ("epsilon", f"{spent}, at delta {plan.delta:.3g} ({found.relation}, {found.accountant})"),
        ("noise", _noise(plan, noise)),
    ]
    return lines + [("warning", text) for text in _warnings(plan)]


def _noise(plan: PrivacyPlan, noise: float) -> str:
    """Its standard deviation on every value."""
    clip = plan.mechanism.clip
    if isinstance(plan.mechanism, DpFtrl):
        most = plan.mechanism.sensitivity(plan.experiment.rounds)
        return f"{noise:.4g} x {most:.4g}, what one client can change in the whole run, x the clip {clip:g}"
    where = "the sum of a round" if not plan.by_client else "what a client sends"
    where = "a secure sum" if isinstance(plan.mechanism, DiscreteNoise) else where
    where = where if plan.unit == "client" else "the sum of a step"
    return f"{noise:.4g} x the clip {clip:g} on every value of {where}"


def _who(plan: PrivacyPlan) -> str:
    return "all that one client holds" if plan.unit == "client" else "each single record of a client"


def _whom(plan: PrivacyPlan) -> str:
    if plan.by_client:
        return "the server, the other clients and everybody who sees the model"
    return "everybody who sees the models, but the server, which adds the noise"


def _sampling(plan: PrivacyPlan) -> str:
    secret = "nobody who sees the model may know who took part"
    if plan.by_client:
        secret = "it makes no difference, for each client adds its own noise"
    if isinstance(plan.mechanism, DiscreteNoise):
        secret = "it makes no difference, for the server knows whose updates are in a sum"
    match plan.scheme:
        case PoissonScheme(rate):
            return f"each client by a coin of {rate:g}; {secret}"
        case FixedSizeScheme(population, cohort):
            return f"{cohort} of {population} clients by lot; {secret}"
        case RotationScheme(apart):
            return f"in turn, {counted(apart, 'round')} apart; who takes part need not be secret"
        case _:
            return "every client; who takes part need not be secret"


def _warnings(plan: PrivacyPlan) -> list[str]:
    """What can be run, and is hardly meant."""
    experiment, found = plan.experiment, []
    noise = plan.mechanism.noise_multiplier or 0.0
    cohort = experiment.federation.expected_cohort(len(plan.sizes))
    if plan.unit == "client" and not plan.by_client and cohort < 20 * noise:
        found.append(
            f"a round adds up {cohort:g} clips at most, and the noise is {noise:.3g} clips on every value: the model "
            "will hardly learn; take more clients, or protect single records with the work dp_sgd"
        )
    if isinstance(plan.scheme, FixedSizeScheme) and plan.unit == "client" and not plan.by_client:
        found.append("a cohort of fixed size costs about three times the epsilon of poisson sampling at the same rate")
    if _both_factors(plan):
        found.append(
            "both factors of lora are noised, and their product multiplies noise with noise; the methods "
            "dp_ffa_lora, dp_fedsvd and dp_fed_sb noise one factor, so that noise enters the weights once"
        )
    if experiment.evaluation.private:
        found.append(
            "nothing is evaluated: scores would leave the clients without noise (evaluation.private: false has them, "
            "outside of the guarantee)"
        )
    demand = experiment.demands.privacy
    if demand is not None and demand.seeded_noise:
        found.append(
            "demands.privacy.seeded_noise draws noise that anybody with this file can subtract: for tests alone"
        )
    return found


def _both_factors(plan: PrivacyPlan) -> bool:
    """Whether a round trains, and noises, lora_A and lora_B."""
    experiment, scope = plan.experiment, plan.experiment.task.scope
    names = [name for name in ("base.lora_A", "base.lora_B") if scope.trains(name) and scope.shares(name)]
    sent = isinstance(experiment.task.adapter, Lora) and len(names) == 2
    products = any(Fact.SHAPE in stage.traits.loses for stage in experiment.stages)
    together = any(all(experiment.trains_in_round(name, round) for name in names) for round in (0, 1))
    return sent and together and not products
