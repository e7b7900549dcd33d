"""What would make a guarantee void is refused by name, before a model loads; and what is next to it passes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedllm.data.sampling import All, PoissonSampling, RotationSampling, Sampling, UniformSampling
from fedllm.errors import CheckError, FedllmError
from fedllm.experiment.checks.check import check
from fedllm.experiment.checks.privacy import check_privacy
from fedllm.experiment.privacy import plan_of
from fedllm.experiment.record import Experiment
from fedllm.privacy.schemes import PoissonScheme
from fedllm.runs.preview import preview
from fedllm.runs.privacy_words import privacy_lines
from tests.runs.small import SIZES, small, write_records

EXPECTED: dict[str, Any] = {"uniform": {"denominator": "expected"}}
GAUSSIAN: dict[str, Any] = {"gaussian_dp": {"clip": 1.0, "noise_multiplier": 1.0}}
MANY = {f"client {number}": 4 for number in range(100)}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_records(tmp_path_factory.mktemp("data") / "records.jsonl")


def made(data: Path, *stages: Any, **changes: Any) -> Experiment:
    return small(data, stages=[EXPECTED, *(stages or [GAUSSIAN])], **{"evaluation": {"metrics": []}, **changes})


def sampled(data: Path, sampling: Sampling, *stages: Any, **changes: Any) -> Experiment:
    found = made(data, *stages, **changes)
    return replace(found, federation=replace(found.federation, sampling=sampling))  # type: ignore[type-var]


REFUSED = {
    "two at once": (
        {"stages": [EXPECTED, GAUSSIAN, {"local_gaussian": {"clip": 1.0, "noise_multiplier": 1.0}}]},
        "stages: gaussian_dp and local_gaussian both bound and noise the updates; keep one",
    ),
    "unequal weights": ({"stages": ["by_examples", GAUSSIAN]}, "every client weighs the same, but by_examples"),
    "who answered": ({"stages": ["uniform", GAUSSIAN]}, "uniform divides by a number that depends on who answered"),
    "a part that nothing bounds": (
        {"stages": ["lora_residual", EXPECTED, GAUSSIAN]},
        "bounds what one client can change, but not the part '.*' that lora_residual makes",
    ),
    "grown behind the clip": (
        {"stages": [EXPECTED, GAUSSIAN, {"quantize": 1}]},
        "gaussian_dp bounds the norm .*, but quantize behind it does not say by how much it may grow it",
    ),
    "a demand and no noise": (
        {"stages": [EXPECTED], "demands": {"privacy": {"target_epsilon": 8.0}}},
        r"demands\.privacy is set, but nothing adds noise; add the stage gaussian_dp",
    ),
    "a demand and noise of 0": (
        {"stages": [EXPECTED, {"gaussian_dp": {"clip": 1.0, "noise_multiplier": 0.0}}],
         "demands": {"privacy": {"target_epsilon": 8.0}}},
        "gaussian_dp has noise_multiplier 0, which hides nothing",
    ),
    "no number": ({"stages": [EXPECTED, {"gaussian_dp": 1.0}]}, "gaussian_dp has no noise_multiplier, and nothing"),
    "a quorum": (
        {"stages": [EXPECTED, GAUSSIAN], "limits": {"quorum": 2}},
        r"limits\.quorum is 2: with one answer fewer those of all others would be dropped, .* the clip of gaussian_dp",
    ),
    "noise of the work that nobody sets": (
        {"stages": [EXPECTED, {"gaussian_dp": 1.0}], "demands": {"privacy": {"target_epsilon": 8.0}},
         "work": {"dp_sgd": {"steps": 1}}},
        "work: dp_sgd has no noise_multiplier, and .* sets that of gaussian_dp; set work.dp_sgd.noise_multiplier",
    ),
    "evaluations": (
        {"stages": [EXPECTED, GAUSSIAN], "evaluation": {"every": 1}},
        r"evaluation\.every asks for scores on the clients' records, which would leave them in the clear .*"
        r"set evaluation\.private to false",
    ),
    "baselines": ({"stages": [EXPECTED, GAUSSIAN], "evaluation": {"compare": ["local_only"]}}, r"evaluation\.compare"),
    "metrics": ({"stages": [EXPECTED, GAUSSIAN], "evaluation": {"metrics": ["accuracy"]}}, r"evaluation\.metrics"),
}  # fmt: skip


@pytest.mark.parametrize("rule", REFUSED)
def test_a_void_guarantee_is_refused(data: Path, rule: str) -> None:
    changes, message = REFUSED[rule]
    with pytest.raises(CheckError, match=message) as caught:
        check(small(data, **{"evaluation": {"metrics": []}, **changes}))
    assert "\n" not in str(caught.value)


def test_what_is_next_to_it_passes(data: Path) -> None:
    check(made(data))
    check(made(data, GAUSSIAN, {"quantize": 8}, evaluation={"private": False, "every": 1, "compare": ["local_only"]}))
    check(made(data, {"gaussian_dp": 1.0}, demands={"privacy": {"target_epsilon": 8.0}}))
    check(made(data, {"local_gaussian": {"clip": 1.0, "noise_multiplier": 1.0}}, limits={"quorum": 2}))
    check(small(data, stages=["scaffold", "momentum", {"top_k": 0.1}, EXPECTED, GAUSSIAN], evaluation={"metrics": []}))


class Biased(Sampling):
    """Always the same two, whom an accountant knows nothing of."""

    def draw(self, clients: Any, key: Any, round: int = 0) -> Any:
        return clients[:2]


FTRL: dict[str, Any] = {"dp_ftrl": {"clip": 1.0, "noise_multiplier": 1.0, "separation": 5}}
WITH_CLIENTS = {
    "nobody": (lambda d: sampled(d, PoissonSampling(0.0)), "no client ever takes part, .* raise the rate"),
    "an unknown sampler": (lambda d: sampled(d, Biased()), "a sampler that the accountant does not know"),
    "a cohort by chance": (
        lambda d: replace(
            sampled(d, PoissonSampling(0.1)), stages=small(d, stages=[{"uniform": "cohort"}, GAUSSIAN]).stages
        ),
        "uniform divides by the size of the cohort, which poisson leaves to chance; set its denominator: expected",
    ),
    "an end by chance": (
        lambda d: sampled(d, PoissonSampling(0.1), limits={"bytes": 1000}),
        r"limits\.bytes would end the run after a number of rounds that depends on who took part",
    ),
    "a band longer than the run": (
        lambda d: made(d, {"dp_ftrl": {"clip": 1.0, "noise_multiplier": 1.0, "band": 9}}),
        r"dp_ftrl\.band is 9, but the run has 3 rounds; set band to 3 or less",
    ),
    "correlated noise and chance": (
        lambda d: sampled(d, PoissonSampling(0.1), FTRL),
        "dp_ftrl counts on rounds between two parts of one client, which chance does not keep",
    ),
    "a rotation that is too fast": (
        lambda d: sampled(d, RotationSampling(25), FTRL),
        r"dp_ftrl\.separation is 5, but the sampler draws a client again after 4 rounds; set separation to 4",
    ),
    "a delta that permits to publish one": (
        lambda d: made(d, demands={"privacy": {"target_delta": 0.01}}),
        r"target_delta is 0\.01, which is not below 1 / 100: a method that publishes one of 100 clients would pass",
    ),
    "a target that no noise reaches": (
        lambda d: made(d, {"gaussian_dp": 1.0}, demands={"privacy": {"target_epsilon": 1e-6, "target_delta": 1e-12}}),
        r"demands\.privacy\.target_epsilon: no noise reaches epsilon 1e-06 at delta 1e-12",
    ),
}


@pytest.mark.parametrize("rule", WITH_CLIENTS)
def test_what_depends_on_the_clients_is_refused(data: Path, rule: str) -> None:
    make, message = WITH_CLIENTS[rule]
    with pytest.raises(FedllmError, match=message) as caught:
        check_privacy(make(data), MANY)
    assert "\n" not in str(caught.value)


def test_each_scheme_is_accounted_for_what_it_is(data: Path) -> None:
    """N 200, m 20, n 50, z 2: the figures of the three assumptions, computed apart with dp-accounting."""
    clients = {f"c{number}": 1 for number in range(200)}
    stage = {"gaussian_dp": {"clip": 1.0, "noise_multiplier": 2.0}}
    expected = {PoissonSampling(0.1): (1.65, "add-remove"), UniformSampling(20): (9.43, "replace-one"),
                All(): (20.7, "add-remove")}  # fmt: skip
    for sampling, (epsilon, relation) in expected.items():
        plan = check_privacy(sampled(data, sampling, stage, rounds=50), clients)
        assert plan is not None
        found = plan.guarantee(50)
        assert found.epsilon == pytest.approx(epsilon, abs=0.05) and found.relation == relation


def test_check_says_who_is_protected_and_at_which_epsilon(data: Path) -> None:
    plan = check_privacy(made(data, {"gaussian_dp": 0.5}, demands={"privacy": {"target_epsilon": 8.0}}), MANY)
    assert plan is not None
    lines = dict(privacy_lines(plan)[:4])
    assert "all that one client holds" in lines["privacy"] and "the server, which adds the noise" in lines["privacy"]
    assert "after 1 round" in lines["epsilon"] and "add-remove" in lines["epsilon"]
    assert float(lines["epsilon"].split(" after 3")[0].split()[-1]) == pytest.approx(8.0, rel=0.01)
    warnings = [text for what, text in privacy_lines(plan) if what == "warning"]
    assert any("ffa_lora" in text for text in warnings), "both factors are noised"


def test_few_silos_are_told_that_noise_drowns_them(data: Path) -> None:
    plan = check_privacy(made(data, {"gaussian_dp": {"clip": 1.0, "noise_multiplier": 2.0}}), SIZES)
    assert plan is not None
    assert any("dp_sgd" in text and "3 clips at most" in text for _, text in privacy_lines(plan))


def test_the_plan_is_printed_before_a_model_loads(data: Path) -> None:
    experiment = made(data, task__model="no-such-model-but-nobody-looks")
    with pytest.raises(FedllmError):
        preview(experiment, Path("private.yaml"))
    lines = preview(made(data), Path("private.yaml"))
    assert [what for what, _ in lines if what in ("privacy", "sampling", "epsilon", "noise")] == [
        "privacy", "sampling", "epsilon", "noise"]  # fmt: skip


def test_a_run_without_private_stages_promises_nothing(data: Path) -> None:
    assert plan_of(small(data), SIZES) is None and check_privacy(small(data), SIZES) is None


def test_clients_of_other_steps_and_batches_are_accounted_for_as_they_train(data: Path) -> None:
    """ben takes 10 steps of 2 of 3 examples, and not one step of 1: the promise is of the largest rate and number."""
    work = {"dp_sgd": {"steps": 1, "batch_size": 1, "noise_multiplier": 1.0}}
    exp = small(data, stages=["uniform"], work=work, evaluation={"metrics": []},
                federation__shards__profiles={"ben": {"steps": 10, "batch_size": 2}})  # fmt: skip
    plan = plan_of(exp, SIZES)
    assert plan is not None
    ben, ann = plan.of_client("ben"), plan.of_client("ann")
    assert (ben.steps, ben.scheme) == (10, PoissonScheme(2 / 3)) and (ann.steps, ann.scheme) == (
        1,
        PoissonScheme(1 / 6),
    )
    assert dict(plan.ledger(3)) == {ben: 3}
