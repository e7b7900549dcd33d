"""What `check` says of every pair of stages, and of every stage beside other settings: tables of what traits come to.

A trait that is lost or added by mistake shows here.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from fedllm.errors import CheckError
from fedllm.experiment.catalog import STAGES
from fedllm.experiment.checks.check import check, check_profiles
from fedllm.experiment.record import Demands, Experiment
from fedllm.messages.context import Profile
from fedllm.messages.traits import Bracket
from fedllm.models.adapters.sparse_lora import SparseLora
from fedllm.models.adapters.weights import Full
from fedllm.models.task import Scope, Task
from fedllm.stages.base import Stage
from fedllm.stages.client_drift.dyn import Dyn
from fedllm.stages.compression.quantize import Quantize
from fedllm.stages.compression.top_k import TopK
from fedllm.stages.lora.bandwidth_cap import LoraCap
from fedllm.stages.lora.pad import LoraPad
from fedllm.stages.lora.product import LoraProduct
from fedllm.stages.personalization.keep import Keep
from fedllm.stages.privacy.base import PrivateStage
from fedllm.stages.privacy.discrete_noise import DiscreteNoise
from fedllm.stages.privacy.dp_ftrl import DpFtrl
from fedllm.stages.privacy.gaussian_dp import GaussianDp
from fedllm.stages.privacy.local_gaussian import LocalGaussian
from fedllm.stages.privacy.selective_encryption import SelectiveEncryption
from fedllm.stages.weighting.by_examples import ByExamples
from fedllm.stages.weighting.uniform import Uniform
from fedllm.training.sgd import Sgd
from tests.experiment.test_check import PLAIN, Asynchronous, EarlyClip, Gossip, Secret, ZerothOrder

UNIFORM = Uniform()
GIVEN: dict[str, Stage] = {
    "keep": Keep(("*lora_B",)),
    "top_k": TopK(0.5),
    "quantize": Quantize(4),
    "gaussian_dp": GaussianDp(1.0, 1.0),
    "dp_ftrl": DpFtrl(1.0, 1.0),
    "local_gaussian": LocalGaussian(1.0, 1.0),
    "selective_encryption": SelectiveEncryption(0.5, "drop"),
}
BRANCHES = (
    "ditto",
    "fdlora",
    "personal_last",
    "rest_of_world",
    "seed_pool",
)  # of another adapter: tests/experiment/test_branches.py
POOL: dict[str, Stage] = {
    name: GIVEN[name] if name in GIVEN else cls()
    for name, cls in STAGES.items()
    if cls not in (ByExamples, Uniform, DiscreteNoise)  # the last needs a secure sum: its column of the compatibility
    and name not in BRANCHES
}
OPTIMIZERS = "momentum adagrad adam yogi nesterov"
SELECT = "selective_encryption"
DP = "gaussian_dp dp_ftrl local_gaussian"
LORA = "lora_fair lora_pad lora_stack lora_prune lora_product lora_svd lora_merge lora_residual sparse_first"

# By stage, those that may stand behind it in the list; the adapter is sparse_lora, and all clients weigh the same.
PAIRS = {
    "keep": f"keep prox scaffold dyn {OPTIMIZERS} top_k quantize lora_pad {DP} fixed_point {SELECT}",
    "prox": f"prox scaffold dyn {OPTIMIZERS} top_k quantize {LORA} {DP} fixed_point {SELECT}",
    "scaffold": f"prox dyn {OPTIMIZERS} top_k quantize lora_fair lora_pad lora_residual sparse_first {DP} fixed_point "
    f"{SELECT}",
    "dyn": f"prox scaffold lora_pad {DP}",
    **dict.fromkeys(
        OPTIMIZERS.split(),
        f"prox scaffold {OPTIMIZERS} top_k quantize lora_fair lora_pad lora_prune {DP} fixed_point {SELECT}",
    ),
    "top_k": f"prox {OPTIMIZERS} top_k quantize lora_fair lora_pad lora_residual sparse_first {DP} fixed_point "
    f"{SELECT}",
    "quantize": f"keep prox scaffold {OPTIMIZERS} top_k quantize {LORA} {DP} {SELECT}",
    **dict.fromkeys(["lora_fair", "lora_stack", "lora_merge", "lora_residual"], f"prox quantize fixed_point {SELECT}"),
    "lora_pad": f"prox scaffold dyn {OPTIMIZERS} top_k quantize lora_fair lora_cap lora_product lora_svd lora_merge "
    f"lora_residual sparse_first fixed_point {SELECT}",
    "lora_prune": f"{OPTIMIZERS} top_k quantize lora_cap lora_svd sparse_first fixed_point",
    "lora_cap": "lora_pad lora_prune",
    "lora_product": f"prox {OPTIMIZERS} top_k quantize {DP} fixed_point {SELECT}",
    "lora_svd": f"prox quantize {LORA} gaussian_dp local_gaussian fixed_point {SELECT}",
    "sparse_first": f"prox scaffold dyn {OPTIMIZERS} top_k quantize {LORA} gaussian_dp local_gaussian "
    f"fixed_point {SELECT}",
    # Private stages stand behind the weigher, wherever they are listed: here is what may stand beside them.
    "gaussian_dp": f"keep prox scaffold dyn {OPTIMIZERS} top_k quantize lora_product lora_svd sparse_first fixed_point",
    "local_gaussian": f"keep prox scaffold dyn {OPTIMIZERS} top_k quantize lora_product lora_svd sparse_first",
    "dp_ftrl": f"keep prox scaffold dyn {OPTIMIZERS} top_k quantize lora_product fixed_point",
    SELECT: f"keep prox scaffold {OPTIMIZERS} top_k quantize lora_fair lora_pad lora_stack lora_product lora_svd "
    "lora_merge lora_residual sparse_first fixed_point",
    "fixed_point": f"keep prox scaffold {OPTIMIZERS} top_k {LORA} gaussian_dp dp_ftrl",
}

TASK = Task("tiny-llama", adapter=SparseLora())
SETTINGS = {
    "freeze": {"task": replace(TASK, scope=Scope(freeze=("*lora_A",)))},
    "alternate": {"task": replace(TASK, scope=Scope(alternate=("*lora_A", "*lora_B")))},
    "share": {"task": replace(TASK, scope=Scope(share=("*lora_A",)))},
    "full": {"task": replace(TASK, adapter=Full())},
    "int4": {"task": replace(TASK, quantize="int4")},
    "adamw": {"work": Sgd(optimizer="adamw", steps=1)},
    "secrecy": {"demands": Demands(secrecy=True)},
    "zeroth_order": {"work": ZerothOrder()},
    "asynchronous": {"schedule": Asynchronous()},
    "gossip": {"schedule": Gossip()},
}
WEIGHERS = {"by_examples": ByExamples(), "cohort": Uniform("cohort")}
PROFILES = {"rank": {"a": Profile(), "b": Profile(rank=4)}, "bandwidth": {"a": Profile(bandwidth=99)}}

# By stage, the settings that it does not go with. Ranks and bandwidths need a stage for them, which most are not.
ALONE = {
    **dict.fromkeys(["keep", "top_k", "quantize"], "rank bandwidth"),
    **dict.fromkeys(OPTIMIZERS.split(), "gossip rank bandwidth"),
    "prox": "zeroth_order rank bandwidth",
    "scaffold": "adamw zeroth_order gossip rank bandwidth",
    "dyn": "by_examples adamw zeroth_order gossip rank bandwidth",
    "lora_fair": "freeze alternate share full secrecy asynchronous rank bandwidth",
    "lora_pad": "bandwidth",
    "lora_stack": "freeze alternate share full secrecy asynchronous bandwidth",
    "lora_prune": "freeze alternate share full cohort zeroth_order bandwidth",
    "lora_cap": "freeze alternate share full",
    "lora_product": "freeze alternate share full bandwidth",
    "lora_svd": "freeze alternate share full asynchronous rank bandwidth",
    "lora_merge": "freeze alternate share full int4 secrecy asynchronous bandwidth",
    "lora_residual": "freeze alternate share full int4 secrecy asynchronous rank bandwidth",
    "sparse_first": "freeze alternate share full int4 rank bandwidth",
    **dict.fromkeys(("gaussian_dp", "local_gaussian"), "by_examples rank bandwidth"),
    "dp_ftrl": "alternate gossip by_examples rank bandwidth",
    "fixed_point": "rank bandwidth",
    SELECT: "rank bandwidth",
}


def with_stages(*stages: Stage, weigher: Stage | None = None) -> Experiment:
    """The stages as they are listed, but for what stands behind the weigher: the plain mean, or of private stages one
    with a fixed denominator."""
    private = any(isinstance(stage, PrivateStage) for stage in stages)
    weigher = weigher or (Uniform("expected") if private else UNIFORM)
    ordered = sorted((*stages, weigher), key=lambda stage: max(stage.traits.bracket, Bracket.MEANING))
    return replace(PLAIN, task=TASK, stages=tuple(ordered), aggregator=Secret())


def passes(experiment: Experiment, profiles: dict[str, Profile] | None = None) -> bool:
    try:
        check(experiment)
        check_profiles(experiment, profiles or {})
    except CheckError:
        return False
    return True


def test_every_stage_is_in_both_tables() -> None:
    assert PAIRS.keys() == ALONE.keys() == POOL.keys(), "a new stage has a row in each"


@pytest.mark.parametrize("name", POOL)
def test_which_stages_may_stand_behind_a_stage(name: str) -> None:
    found = [other for other, stage in POOL.items() if passes(with_stages(POOL[name], stage))]
    assert sorted(found) == sorted(PAIRS[name].split())


@pytest.mark.parametrize("name", POOL)
def test_which_settings_a_stage_does_not_go_with(name: str) -> None:
    stages = (LoraPad(), POOL[name]) if name == "lora_cap" else (POOL[name],)  # which marks the components
    found = [setting for setting, change in SETTINGS.items() if not passes(replace(with_stages(*stages), **change))]
    found += [other for other, weigher in WEIGHERS.items() if not passes(with_stages(*stages, weigher=weigher))]
    found += [kind for kind, profiles in PROFILES.items() if not passes(with_stages(*stages), profiles)]
    assert sorted(found) == sorted(ALONE[name].split())


def behind(*stages: Stage, profiles: dict[str, Profile] | None = None) -> set[str]:
    """The stages that may stand behind some."""
    return {name for name, stage in POOL.items() if passes(with_stages(*stages, stage), profiles)}


def test_behind_the_products_themselves_stands_what_does_not_need_steps() -> None:
    assert behind(LoraProduct("product")) == {"prox", "quantize", "fixed_point", SELECT}


def test_beside_padding_clients_may_have_unequal_ranks_where_all_of_an_update_has_one_shape() -> None:
    refused = {"scaffold", "dyn", "lora_fair", "lora_residual", SELECT}
    assert behind(LoraPad(), profiles=PROFILES["rank"]) == set(PAIRS["lora_pad"].split()) - refused
    assert not passes(with_stages(GIVEN["keep"], LoraPad()), PROFILES["rank"])


def test_behind_a_bound_stands_what_does_not_encode_or_rounds() -> None:
    rounding = {"quantize", "fixed_point"}
    assert behind(EarlyClip()) == {"prox", *OPTIMIZERS.split(), *rounding, "lora_svd", "sparse_first", *DP.split()}
    assert passes(with_stages(LoraPad(), EarlyClip(), LoraCap()))


def test_a_bandwidth_is_met_once_and_changes_no_sum_of_controls() -> None:
    assert passes(with_stages(LoraPad(), LoraCap()), PROFILES["bandwidth"])
    assert not passes(with_stages(LoraPad(), LoraCap(), LoraCap()), PROFILES["bandwidth"])
    assert passes(with_stages(Dyn(), LoraPad(), LoraCap()))
