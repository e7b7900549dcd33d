"""What a run promises about privacy: in lines that `fedllm check` prints, and as the event that the report reads."""

from __future__ import annotations

from fedllm.errors import counted
from fedllm.events import PrivacyPromised
from fedllm.experiment.privacy import PrivacyPlan
from fedllm.privacy.schemes import FixedSizeScheme, PoissonScheme, RotationScheme, Scheme
from fedllm.runs.privacy_ledger import assumptions, finite
from fedllm.stages.privacy.gaussian_dp import GaussianDp


def promised(plan: PrivacyPlan) -> PrivacyPromised:
    """The promise of a run whose noise is set."""
    mechanism, demand = plan.mechanism, plan.experiment.demands.privacy
    noise = float(mechanism.noise_multiplier or 0.0)
    found = plan.guarantee(plan.experiment.rounds) if noise and plan.experiment.rounds else None
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
    lines = [("privacy", f"protects {_who(plan)} against {_whom(plan)}"), ("sampling", _sampling(plan.scheme))]
    if not noise:
        return [*lines, ("epsilon", "none: noise_multiplier is 0, which hides nobody")]
    one, all_rounds = plan.curve([min(1, rounds), rounds])
    spent = f"{one:.3g} after 1 round, {all_rounds:.3g} after {rounds}" if rounds > 1 else f"{all_rounds:.3g}"
    found = plan.guarantee(rounds)
    lines += [
        ("epsilon", f"{spent}, at delta {plan.delta:.3g} ({found.relation}, {found.accountant})"),
        ("noise", f"{noise:.4g} times the clip {plan.mechanism.clip:g}"),
    ]
    return lines + [("warning", text) for text in _warnings(plan)]


def _who(plan: PrivacyPlan) -> str:
    return "all that one client holds" if plan.unit == "client" else "each single record of a client"


def _whom(plan: PrivacyPlan) -> str:
    if plan.by_client:
        return "the server, the other clients and everybody who sees the model"
    return "everybody who sees the models, but the server, which adds the noise"


def _sampling(scheme: Scheme) -> str:
    match scheme:
        case PoissonScheme():
            return f"each client by a coin of {scheme.rate:g}, which nobody who sees the model may know"
        case FixedSizeScheme():
            return f"{scheme.cohort} of {scheme.population} clients, accounted for one that is replaced"
        case RotationScheme():
            return f"in turn, {counted(scheme.min_separation, 'round')} apart; nobody counts on chance"
        case _:
            return "every client; nobody counts on chance"


def _warnings(plan: PrivacyPlan) -> list[str]:
    """What can be run, and is hardly meant."""
    experiment, found = plan.experiment, []
    noise = plan.mechanism.noise_multiplier or 0.0
    cohort = experiment.federation.expected_cohort(len(plan.sizes))
    if plan.unit == "client" and not plan.by_client and cohort < 20 * noise:
        found.append(
            f"a round sums at most {cohort:g} clips, and the noise is {noise:.3g} clips on every value: "
            "the model will hardly learn; take more clients, or protect single records with the work dp_sgd"
        )
    if isinstance(plan.scheme, FixedSizeScheme) and plan.unit == "client" and not plan.by_client:
        found.append("a cohort of fixed size costs about three times the epsilon of poisson sampling at the same rate")
    if _both_factors(plan):
        found.append(
            "both factors of lora are noised, and their product multiplies noise with noise; ffa_lora, fedsvd or "
            "fed_sb noise one factor, which enters the weights linearly"
        )
    if experiment.evaluation.private:
        found.append(
            "nothing is evaluated: scores would leave clients in the clear (evaluation.private: false has them)"
        )
    demand = experiment.demands.privacy
    if demand is not None and demand.seeded_noise:
        found.append(
            "demands.privacy.seeded_noise draws noise that anybody with this file can subtract: for tests alone"
        )
    return found


def _both_factors(plan: PrivacyPlan) -> bool:
    """Whether a round trains, and noises, lora_A and lora_B."""
    moves = plan.experiment.trains_in_round
    names = ("base.lora_A", "base.lora_B")
    lora = type(plan.experiment.task.adapter).__name__ == "Lora"
    return lora and any(all(moves(name, round) for name in names) for round in (0, 1))
