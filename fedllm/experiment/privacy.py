"""What an experiment promises about privacy: who is protected, by which noise, and what its rounds will cost.

A plan follows from the stage or the work that adds the noise, from the sampler, and from the clients' sizes, all of
which are known before a model loads. What a run has really spent is counted elsewhere, release by release.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil
from typing import Literal

from fedllm.errors import CheckError, ConfigError, PrivacyError, config_name
from fedllm.experiment.record import Experiment
from fedllm.privacy.accountant import Guarantee, epsilon, epsilons
from fedllm.privacy.calibration import noise_multiplier
from fedllm.privacy.releases import Release
from fedllm.privacy.schemes import PoissonScheme, Scheme
from fedllm.stages.privacy.base import PrivateStage
from fedllm.stages.privacy.discrete_noise import DiscreteNoise
from fedllm.training.dp_sgd import DpSgd

Unit = Literal["client", "example"]
Ledger = Mapping[Release, int]
MOST_DELTA = 1e-5


@dataclass(frozen=True)
class PrivacyPlan:
    """The mechanism of an experiment and its costs.

    Args:
        mechanism: the stage or the work that adds the noise. scheme: how clients come into a round.
        sizes: examples by client.
    """

    experiment: Experiment
    mechanism: PrivateStage | DpSgd
    scheme: Scheme
    delta: float
    sizes: Mapping[str, int]

    @property
    def unit(self) -> Unit:
        """Who is protected."""
        return "client" if isinstance(self.mechanism, PrivateStage) else "example"

    @property
    def name(self) -> str:
        """As a file writes it."""
        return config_name(self.mechanism)

    @property
    def by_client(self) -> bool:
        """Whether each client adds its own noise, so that each has a ledger of its own."""
        return not isinstance(self.mechanism, PrivateStage) or self.mechanism.noised_by == "client"

    def of_client(self, client: str, noise: float | None = None) -> Release:
        """What one round costs a client that adds its own noise."""
        z = self.mechanism.noise_multiplier if noise is None else noise
        assert z is not None
        if isinstance(self.mechanism, PrivateStage):
            return self.mechanism.release(z, self.scheme)
        own = self.mechanism.for_profile(self.experiment.federation.profile(client))
        return example_release(replace(own, noise_multiplier=z), self.sizes[client])

    def ledger(self, rounds: int, noise: float | None = None) -> Ledger:
        """What so many rounds cost the client that they cost most."""
        z = self.mechanism.noise_multiplier if noise is None else noise
        assert z is not None
        if not self.by_client:
            assert isinstance(self.mechanism, PrivateStage)
            release = self.mechanism.release(z, self.scheme)
            return {release: min(rounds, 1) if release.kind == "correlated" else rounds}
        share = ceil(self._participations * rounds / max(1, self.experiment.rounds))
        return {self._dearest(z): min(share, rounds)}

    @cached_property
    def _participations(self) -> int:
        """The most rounds of a whole run that one client is drawn for."""
        exp, clients = self.experiment, tuple(self.sizes)
        cohorts = (exp.federation.sample(clients, round, exp.key) for round in range(exp.rounds))
        return max(Counter(client for cohort in cohorts for client in cohort).values(), default=0)

    def _dearest(self, noise: float) -> Release:
        """A round that costs no client more: of `dp_sgd` with the largest rate and the most steps that any has."""
        if isinstance(self.mechanism, PrivateStage):
            return self.of_client(next(iter(self.sizes)), noise)
        rate, steps = self._most
        return Release("example", noise, PoissonScheme(rate), steps)

    @cached_property
    def _most(self) -> tuple[float, int]:
        """The largest rate and the most steps of all clients, whose devices may differ."""
        found = [self.of_client(client, 1.0) for client in self.sizes]
        return max(one.scheme.rate for one in found if isinstance(one.scheme, PoissonScheme)), max(
            one.steps for one in found
        )

    def guarantee(self, rounds: int) -> Guarantee:
        """What the run promises after so many rounds."""
        return epsilon(self.ledger(rounds), self.delta)

    def curve(self, rounds: Sequence[int]) -> list[float]:
        """Epsilon after each of these numbers of rounds."""
        by_round: list[Ledger] = []
        for number in range(1, max(rounds, default=0) + 1):
            before, after = Counter(self.ledger(number - 1)), Counter(self.ledger(number))
            by_round.append({release: count - before[release] for release, count in after.items()})
        return epsilons(by_round, self.delta, rounds)


def example_release(work: DpSgd, num_examples: int) -> Release:
    """What one round costs a client with so many examples: its local steps, each of which takes every example by a coin
    of its own.

    Raises:
        ConfigError: `noise_multiplier` is None.
    """
    if work.noise_multiplier is None or work.steps is None:
        raise ConfigError(
            "work.dp_sgd.noise_multiplier is not set; set it, or demands.privacy.target_epsilon to find it"
        )
    return Release("example", work.noise_multiplier, PoissonScheme(work.rate(num_examples)), work.steps)


def mechanism_of(experiment: Experiment) -> PrivateStage | DpSgd | None:
    """What adds the noise that a run counts on: a stage, or else the work."""
    stages = [stage for stage in experiment.stages if isinstance(stage, PrivateStage)]
    if stages:
        return stages[0]
    return experiment.work if isinstance(experiment.work, DpSgd) else None


def plan_of(experiment: Experiment, sizes: Mapping[str, int]) -> PrivacyPlan | None:
    """The plan of an experiment whose clients have so many examples; None: it promises nothing.

    Raises:
        CheckError: the guarantee would be void; the reason and the remedy.
    """
    mechanism = mechanism_of(experiment)
    if mechanism is None:
        return None
    clients = tuple(sizes)
    if not experiment.federation.expected_cohort(len(clients)):
        raise CheckError("federation: no client ever takes part, so that there is nothing to protect; raise the rate")
    scheme = experiment.federation.scheme(len(clients))
    if scheme is None:
        raise CheckError(
            f"federation: {config_name(mechanism)} cannot account for a sampler that the accountant does not know; "
            "use all, poisson, uniform or rotation"
        )
    plan = PrivacyPlan(experiment, mechanism, scheme, 0.5, sizes)
    return replace(plan, delta=_delta(plan))


def _delta(plan: PrivacyPlan) -> float:
    """The delta that is asked for, or the default.

    Raises:
        CheckError: it is not below 1 / the number of those who are protected.
    """
    demand = plan.experiment.demands.privacy
    count = len(plan.sizes) if plan.unit == "client" else min(plan.sizes.values(), default=1)
    asked = None if demand is None else demand.target_delta
    if asked is None:
        return min(MOST_DELTA, 0.1 / max(1, count))
    if asked * count >= 1:
        whose = f"{count} clients" if plan.unit == "client" else f"the {count} examples of the smallest client"
        raise CheckError(
            f"demands.privacy.target_delta is {asked:g}, which is not below 1 / {count}: a method that publishes one "
            f"of {whose} would pass; set it below {1 / count:g}, or leave it out"
        )
    return asked


def calibrated(plan: PrivacyPlan) -> PrivacyPlan:
    """The plan with the least noise that keeps to its target; as it is where the noise is set.

    Raises:
        CheckError: no noise reaches the target.
    """
    experiment, mechanism = plan.experiment, plan.mechanism
    if mechanism.noise_multiplier is not None:
        return plan
    demand = experiment.demands.privacy
    assert demand is not None and demand.target_epsilon is not None  # `check` has refused it
    try:
        z = noise_multiplier(demand.target_epsilon, plan.delta, lambda noise: plan.ledger(experiment.rounds, noise))
    except PrivacyError as error:
        raise CheckError(f"demands.privacy.target_epsilon: {error}") from error
    noised = replace(mechanism, noise_multiplier=z)
    if isinstance(noised, DpSgd):
        return replace(plan, experiment=replace(experiment, work=noised), mechanism=noised)
    stages = tuple(noised if stage is mechanism else stage for stage in experiment.stages)
    return replace(plan, experiment=replace(experiment, stages=stages), mechanism=noised)


def assumptions(plan: PrivacyPlan) -> list[str]:
    """What the guarantee rests on, in words."""
    who = "the server" if not plan.by_client else "each client's own software"
    found = [
        f"{who} adds the noise and keeps it secret",
        "clients follow the protocol: whoever sends more than the clip has no guarantee, and others keep theirs",
        "settings were not chosen by looking at private data of the same clients",
    ]
    if isinstance(plan.mechanism, DiscreteNoise):
        found.append(
            f"at least {plan.mechanism.survivors} clients of each sum add their noise and do not tell it to the others"
        )
    if plan.scheme.name in ("poisson", "fixed_size") and not plan.by_client:
        found.append(
            "nobody who sees the model knows which clients took part: events.jsonl, summary.json, the report and "
            "checkpoints tell of them, so keep these as secret as the data"
        )
    if plan.experiment.limits.seconds is not None:
        found.append(
            "how long rounds take tells nothing of what clients hold: limits.seconds ends the run by the clock"
        )
    if plan.experiment.aggregator.upload is not None:
        found.append("whether a client is lost does not depend on what it holds: a sum of too few clients is void")
    if not plan.by_client:
        found.append("the checkpoints and the clients' memories are private data of the server and the clients")
    return found
