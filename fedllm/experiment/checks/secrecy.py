"""What a sum of integers, and a secure sum of them, does not go with: refused before a model loads, with the remedy.

That a demand for secrecy needs such an aggregator, and it integers, is in the table of rules. Here is what needs the
settings of both, the number of clients, or their sizes.
"""

from __future__ import annotations

from collections.abc import Mapping

from fedllm.aggregators.bucketed import Bucketed
from fedllm.aggregators.ckks import check_installed
from fedllm.aggregators.homomorphic_sum import HomomorphicSum
from fedllm.aggregators.masked_sum import MaskedSum
from fedllm.errors import CheckError, ConfigError, SecureSumError, config_name
from fedllm.experiment.privacy import mechanism_of
from fedllm.experiment.record import Experiment
from fedllm.privacy.secure_aggregation.parameters import choose, corrupt_clients
from fedllm.privacy.secure_aggregation.primitives import exchange_pair
from fedllm.stages.base import Stage
from fedllm.stages.compression.quantize import Quantize
from fedllm.stages.privacy.discrete_noise import DiscreteNoise
from fedllm.stages.privacy.fixed_point import FixedPoint
from fedllm.stages.privacy.local_gaussian import LocalGaussian
from fedllm.stages.privacy.selective_encryption import SelectiveEncryption
from fedllm.stages.weighting.by_examples import ByExamples

BESIDE: Mapping[type[Stage], str] = {
    Quantize: "rounds to a grid of its own, which the ring of fixed_point replaces: it would add noise and save no "
    "byte; leave out quantize, and choose fixed_point.ring for the bytes",
    LocalGaussian: "adds noise beyond the bound that the range of fixed_point is made for; use gaussian_dp, whose "
    "server adds the noise to the sum",
}


def check_integers(experiment: Experiment) -> None:
    """Refuse what no number of clients could mend.

    Raises:
        CheckError: the first rule that is broken.
    """
    stage, aggregator = fixed_point_of(experiment), experiment.aggregator
    noise = mechanism_of(experiment)
    if isinstance(noise, DiscreteNoise) and noise.noise_multiplier != 0 and not isinstance(aggregator, MaskedSum):
        raise CheckError(
            "stages: discrete_noise gives each client a part of the noise, which hides it in a sum alone, and "
            f"aggregator {config_name(aggregator)} shows each by itself; use the aggregator secure_sum, or the stage "
            "local_gaussian"
        )
    picks = [other for other in experiment.stages if isinstance(other, SelectiveEncryption)]
    if picks and picks[0].rest == "clear" and not isinstance(aggregator, HomomorphicSum):
        raise CheckError(
            f"stages: selective_encryption says what is encrypted, but aggregator {config_name(aggregator)} encrypts "
            "nothing; use the aggregator homomorphic_sum, or leave it out"
        )
    if stage is None:
        return
    if sum(isinstance(other, FixedPoint) for other in experiment.stages) > 1:
        raise CheckError("stages: fixed_point makes integers, and stands twice; keep one")
    for other in experiment.stages:
        if type(other) in BESIDE:
            raise CheckError(f"stages: {config_name(other)} before fixed_point {BESIDE[type(other)]}")
    if isinstance(aggregator, MaskedSum) and aggregator.ring != stage.ring:
        raise CheckError(
            f"fixed_point has ring {stage.ring}, but aggregator {config_name(aggregator)} has ring {aggregator.ring}; "
            "set both to the same"
        )
    if isinstance(aggregator, Bucketed) and aggregator.rule == "median" and experiment.private:
        raise CheckError(
            f"aggregator bucketed: {config_name(mechanism_of(experiment))} bounds what one client changes in a sum, "
            "and a median is none; set its rule to mean"
        )


def _check_noise(experiment: Experiment, most: int) -> None:
    """Noise of several clients needs a sum of at least as many that are honest.

    Raises:
        ConfigError: there may be fewer.
    """
    stage, aggregator = mechanism_of(experiment), experiment.aggregator
    if not (isinstance(stage, DiscreteNoise) and isinstance(aggregator, MaskedSum)) or stage.noise_multiplier == 0:
        return
    corrupt = corrupt_clients(most, aggregator.corrupt)
    honest = aggregator.min_survivors - corrupt
    if stage.survivors > honest:
        raise ConfigError(
            f"stages: discrete_noise.survivors is {stage.survivors}, but a sum may be of "
            f"{aggregator.min_survivors} clients (aggregator {config_name(aggregator)}, min_survivors), of whom "
            f"{corrupt} of {most} may be corrupt; set min_survivors to {stage.survivors + corrupt} or more, or "
            "survivors lower"
        )


def check_cohorts(experiment: Experiment, clients: int) -> None:
    """Refuse cohorts that the ring has no room for, or that no secure sum can be made of.

    Args:
        clients: how many there are.

    Raises:
        CheckError: the first rule that is broken.
        MissingExtra: a secure sum, without the package that encrypts.
    """
    stage, aggregator = fixed_point_of(experiment), experiment.aggregator
    most = experiment.federation.largest_cohort(clients)
    try:
        if stage is not None and clients:
            stage.levels(most)
            stage.digit_bits(clients)  # an evaluation asks all of them
        if clients:
            _check_noise(experiment, most)
        if isinstance(aggregator, HomomorphicSum):
            check_installed()
            if most < aggregator.min_clients:
                raise ConfigError(
                    f"aggregator homomorphic_sum reads no total of fewer than {aggregator.min_clients} clients, but a "
                    f"round asks {most} at most; draw larger cohorts, or lower min_clients"
                )
        if isinstance(aggregator, MaskedSum):
            if most < aggregator.min_survivors:
                raise ConfigError(
                    f"aggregator {config_name(aggregator)} shows no sum of fewer than {aggregator.min_survivors} "
                    f"clients, but a round asks {most} at most; draw larger cohorts, or lower min_survivors (with two, "
                    "each knows the other)"
                )
            _check_groups(aggregator, most)
            smallest = min(most, aggregator.group) if isinstance(aggregator, Bucketed) else most
            choose(smallest, aggregator.corrupt, aggregator.dropout)
            exchange_pair()  # a missing package is told here, and not by each client
    except SecureSumError as error:
        raise CheckError(f"aggregator {config_name(aggregator)}: {error}") from error
    except ConfigError as error:
        raise CheckError(str(error)) from error


def _check_groups(aggregator: MaskedSum, most: int) -> None:
    """
    Raises:
        ConfigError: a median of fewer than three groups, which no group outvotes.
    """
    if isinstance(aggregator, Bucketed) and aggregator.rule == "median" and most < 3 * aggregator.group:
        raise ConfigError(
            f"aggregator bucketed takes the median of groups of {aggregator.group}, but a round asks {most} clients at "
            f"most, and a median needs three groups; draw {3 * aggregator.group} or more, or set rule to mean"
        )


def check_weights(experiment: Experiment, sizes: Mapping[str, int]) -> None:
    """Refuse a client whose weight is above the cap.

    Args:
        sizes: examples by client.

    Raises:
        CheckError: names the client and the cap that it needs.
    """
    stage = fixed_point_of(experiment)
    if stage is None or not any(isinstance(other, ByExamples) for other in experiment.stages) or not sizes:
        return
    client = max(sizes, key=lambda name: sizes[name])
    if sizes[client] > stage.max_weight:
        raise CheckError(
            f"client {client} has {sizes[client]} examples, above fixed_point.max_weight {stage.max_weight:g}; set "
            f"max_weight to {sizes[client]} or more, or weigh with uniform"
        )


def fixed_point_of(experiment: Experiment) -> FixedPoint | None:
    """The stage that makes integers."""
    return next((stage for stage in experiment.stages if isinstance(stage, FixedPoint)), None)
