"""Privacy: the accountant against published epsilons, the calibrated noise, and what both and the noise take.

Each section is a function that returns its figures; `--sections` names those to run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping

import numpy as np

from fedllm.privacy.accountant import epsilon, epsilons
from fedllm.privacy.calibration import noise_multiplier
from fedllm.privacy.noise import NoiseStream, new_key
from fedllm.privacy.releases import Release
from fedllm.privacy.schemes import EveryRound, FixedSizeScheme, PoissonScheme, RotationScheme, Scheme

Figures = dict[str, float]

# Rate, noise, steps, delta, and epsilon by dp-accounting's PLD at its default settings.
TABLE = [
    (1, 4.530877117, 1, 1e-6, 0.9274),
    (0.01, 4, 10000, 1e-5, 0.9470),
    (0.04, 1.5, 2250, 1e-5, 6.7688),
    (256 / 60000, 1.1, 14062, 1e-5, 2.3817),
    (0.01, 1, 1000, 1e-5, 1.8282),
    (0.1, 1, 100, 1e-5, 7.0466),
    (0.1, 0.8, 200, 1e-4, 13.4552),
    (0.5, 2, 50, 1e-3, 6.9811),
    (0.001, 0.7, 5000, 1e-6, 1.3806),
]
SCHEMES: tuple[Scheme, ...] = (EveryRound(), RotationScheme(8), PoissonScheme(0.1), FixedSizeScheme(200, 20))
TARGETS = (1.0, 4.0, 8.0)
DELTA = 1e-5
ROUNDS = 1000
POINTS = 20  # of the curve of a report
DRAWS = 1_000_000
REPEATS = 5


def sums(noise: float, scheme: Scheme, rounds: int) -> dict[Release, int]:
    """The ledger of a run that releases the sum of each round."""
    return {Release("gaussian", noise, scheme): rounds}


def table(options: argparse.Namespace) -> Figures:
    """The largest difference from a table of epsilons."""
    errors = [
        abs(epsilon(sums(noise, PoissonScheme(rate), steps), delta).epsilon - expected)
        for rate, noise, steps, delta, expected in TABLE
    ]
    return {"epsilon_table_max_error": max(errors)}


def calibration(options: argparse.Namespace) -> Figures:
    """By how much of the target the calibrated noise stays below it, at most; infinite where epsilon is above it."""
    unused = []
    for scheme in SCHEMES:
        for target in TARGETS:
            noise = noise_multiplier(target, DELTA, lambda noise, scheme=scheme: sums(noise, scheme, 50))
            reached = epsilon(sums(noise, scheme, 50), DELTA).epsilon
            unused.append(1 - reached / target if reached <= target else float("inf"))
    return {"calibration_overshoot": max(unused)}


def accountant(options: argparse.Namespace) -> Figures:
    """The curve of a report: epsilon after each of 20 rounds of 1,000, sampled at rate 0.01."""
    by_round = [sums(1.0, PoissonScheme(0.01), 1)] * ROUNDS
    started = time.perf_counter()
    epsilons(by_round, DELTA, range(ROUNDS // POINTS, ROUNDS + 1, ROUNDS // POINTS))
    return {"accountant_seconds": time.perf_counter() - started}


def noise(options: argparse.Namespace) -> Figures:
    """Time of a million discrete Gaussians over that of numpy's floating-point ones, which are neither secret nor on a
    grid; the median of pairs."""
    ratios = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        NoiseStream(new_key()).discrete_gaussian(2.0**20, DRAWS)
        between = time.perf_counter()
        np.random.default_rng().normal(0, 2.0**20, DRAWS)
        ratios.append((between - started) / (time.perf_counter() - between))
    return {"noise_over_numpy": statistics.median(ratios)}


def noised_sums(options: argparse.Namespace) -> Figures:
    """By how much the standard deviation of what leaves the server is off the target, after dropouts of 0 to 40 %."""
    from private_step import released

    errors = []
    for lost in (0.0, 0.2, 0.4):
        found = released(clients=50, lost=lost, values=20_000, runs=50, noise_multiplier=1.3, clip=0.7)
        errors.append(abs(statistics.pstdev(found) / (1.3 * 0.7) - 1))
    return {"noise_max_error": max(errors)}


def step(options: argparse.Namespace) -> Figures:
    """The time of a step of dp_sgd over that of a step of sgd, of one stack; and Opacus on PEFT beside it."""
    from private_step import dpsgd_over_batched_step, parser

    found = dpsgd_over_batched_step(parser().parse_args(["--peer"]))
    return {name: value for name, value in found.items() if isinstance(value, float)}


SECTIONS: Mapping[str, Callable[[argparse.Namespace], Figures]] = {
    section.__name__: section for section in (table, calibration, accountant, noise, noised_sums, step)
}


def main() -> None:
    """Print the figures; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the line of JSON alone")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="`step` needs a model")
    options = parser.parse_args()
    figures: Figures = {}
    for name in options.sections:
        found = SECTIONS[name](options)
        if not options.json:
            for figure, value in found.items():
                print(f"{figure:26} {value:.6g}", flush=True)
        figures |= found
    print(json.dumps({"benchmark": "privacy", **figures}))


if __name__ == "__main__":
    main()
