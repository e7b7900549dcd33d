"""Presets: what a name sets, what it refuses, and that ten names are nine methods."""

from __future__ import annotations

import json
from itertools import combinations

import pytest

from fedllm.errors import ConfigError
from fedllm.experiment.checks.check import check
from fedllm.experiment.config_file import build, dump
from fedllm.experiment.methods import METHODS
from fedllm.models.adapters.lora import Lora
from fedllm.models.adapters.lora_xs import LoraXs
from fedllm.models.adapters.multi_lora import MultiLora
from fedllm.models.adapters.soft_prompt import SoftPrompt
from fedllm.models.adapters.sparse_lora import SparseLora
from fedllm.models.adapters.weights import Full
from fedllm.models.task import Phase, Scope
from fedllm.runs import launch
from fedllm.stages.client_drift.dyn import Dyn
from fedllm.stages.client_drift.prox import Prox
from fedllm.stages.client_drift.scaffold import Scaffold
from fedllm.stages.lora.bandwidth_cap import LoraCap
from fedllm.stages.lora.fair import LoraFair
from fedllm.stages.lora.merge import LoraMerge
from fedllm.stages.lora.pad import LoraPad
from fedllm.stages.lora.product import LoraProduct
from fedllm.stages.lora.prune import LoraPrune
from fedllm.stages.lora.residual import LoraResidual
from fedllm.stages.lora.sparse_first import SparseFirst
from fedllm.stages.lora.stack import LoraStack
from fedllm.stages.lora.svd import LoraSvd
from fedllm.stages.personalization.ditto import Ditto
from fedllm.stages.personalization.fdlora import Fdlora
from fedllm.stages.personalization.keep import Keep
from fedllm.stages.personalization.personal_last import PersonalLast
from fedllm.stages.personalization.rest_of_world import RestOfWorld
from fedllm.stages.privacy.base import PrivateStage
from fedllm.stages.privacy.dp_ftrl import DpFtrl
from fedllm.stages.privacy.gaussian_dp import GaussianDp
from fedllm.stages.server_optimizers.adagrad import Adagrad
from fedllm.stages.server_optimizers.adam import Adam
from fedllm.stages.server_optimizers.momentum import Momentum
from fedllm.stages.server_optimizers.nesterov import Nesterov
from fedllm.stages.server_optimizers.yogi import Yogi
from fedllm.stages.weighting.by_examples import ByExamples
from fedllm.stages.weighting.uniform import Uniform
from fedllm.stages.zeroth_order.seed_pool import SeedPool
from fedllm.tensors import tree

PRIVATE = (Uniform("expected"), GaussianDp(1.0))
OWN = Keep(("*.personal.*", "*.router", "mixer.*"))
EXPANSIONS = {
    "fedavg": (ByExamples(),),
    "fedprox": (Prox(mu=0.01), ByExamples()),
    "scaffold": (Scaffold(), Uniform()),
    "fedavgm": (Momentum(beta=0.9, server_lr=1.0), ByExamples()),
    "fedadagrad": (Adagrad(beta1=0.9, tau=1e-3, server_lr=1e-3), ByExamples()),
    "fedadam": (Adam(beta1=0.9, beta2=0.99, tau=1e-3, server_lr=1e-3), ByExamples()),
    "fedyogi": (Yogi(beta1=0.9, beta2=0.99, tau=1e-3, server_lr=1e-3), ByExamples()),
    "feddyn": (Dyn(alpha=0.01), Uniform()),
    "fedit": (ByExamples(),),
    "ffa_lora": (ByExamples(),),
    "rolora": (ByExamples(),),
    "fedsa_lora": (ByExamples(),),
    "lora_fair": (LoraFair(penalty=0.01), ByExamples()),
    "zero_padding": (LoraPad(), ByExamples()),
    "rbla": (LoraPad("contributors"), ByExamples()),
    "flexlora": (LoraStack(), ByExamples()),
    "raflora": (LoraStack("contributors"), ByExamples()),
    "hetlora": (LoraPrune(gamma=0.75, penalty=1e-3), ByExamples()),
    "haflq": (LoraPad("contributors"), ByExamples(), LoraCap()),
    "flora": (LoraMerge(), ByExamples()),
    "fedex_lora": (LoraResidual(), ByExamples()),
    "federa": (ByExamples(),),
    "slora": (SparseFirst(), ByExamples()),
    "fedsvd": (LoraSvd(), ByExamples()),
    "fed_sb": (ByExamples(),),
    "full": (ByExamples(),),
    "ditto": (Ditto(), OWN, ByExamples()),
    "feddpa_t": (OWN, Uniform()),
    "feddpa_f": (PersonalLast(), OWN, Uniform()),
    "fdlora": (Fdlora(), OWN, Nesterov(1.0, 0.5, 1), Uniform()),
    "fedalt": (RestOfWorld(), OWN, Uniform()),
    "fedmezo": (ByExamples(),),
    "fedkseed": (SeedPool(), ByExamples()),
    "decomfl": (SeedPool(), Uniform()),
    "dp_fedavg": PRIVATE,
    "dp_ffa_lora": PRIVATE,
    "dp_fedsvd": (LoraSvd(), *PRIVATE),
    "dp_fed_sb": PRIVATE,
    "dp_ftrl": (Uniform("expected"), DpFtrl(1.0)),
    "fedpower": (LoraProduct(), *PRIVATE),
}
SHARED, PERSONAL = Phase(("*.shared.*",)), Phase(("*.personal.*",))
SCOPES = {
    "ditto": Scope(phases=(PERSONAL, SHARED)),
    "feddpa_t": Scope(phases=(SHARED, Phase(("*.personal.*",), ("*.shared.*",)))),
    "feddpa_f": Scope(phases=(SHARED, PERSONAL)),
    "fdlora": Scope(phases=(PERSONAL, SHARED)),
    "fedalt": Scope(hold=("*.shared.*",)),
    "ffa_lora": Scope(freeze=("*lora_A",)),
    "rolora": Scope(alternate=("*lora_B", "*lora_A")),
    "fedsa_lora": Scope(share=("*lora_A",)),
    "fedsvd": Scope(hold=("*lora_A",)),
    "dp_ffa_lora": Scope(freeze=("*lora_A",)),
    "dp_fedsvd": Scope(hold=("*lora_A",)),
}
ADAPTERS = {
    "full": Full(),
    "fed_sb": LoraXs(),
    "dp_fed_sb": LoraXs(),
    "federa": Lora(init="singular"),
    "slora": SparseLora(),
    "ditto": MultiLora(weights=(0.0, 1.0)),
    "feddpa_t": MultiLora(mixer="similarity", weights=(0.5, 0.5)),
    "feddpa_f": MultiLora(mixer="similarity"),
    "fdlora": MultiLora(mixer="fused"),
    "fedalt": MultiLora(mixer="router"),
}
# Where all clients have one rank, and none a bandwidth.
SAME = ({"fedavg", "fedit", "zero_padding", "rbla", "haflq"}, {"flexlora", "raflora"})
PARTS = {
    "task": {"model": "tiny-llama"},
    "federation": {"shards": {"data": "quickstart", "partition": {"by": "organisation"}}},
    "work": {"sgd": {"steps": 1}},
}


def noise(method):
    """The budget that a private method's noise follows from."""
    private = method in METHODS and any(isinstance(stage, PrivateStage) for stage in EXPANSIONS[method])
    return {"demands": {"privacy": {"target_epsilon": 8.0, "seeded_noise": True}}} if private else {}


def work(method):
    """The kind that a method needs, with a pool for those that have one."""
    settings = {"steps": 1, "pool": 8} if method in ("fedkseed", "decomfl") else {"steps": 1}
    needed = METHODS[method].work if method in METHODS else None
    return {"work": {needed: settings}} if needed else {}


def made(method, **changes):
    named = method if isinstance(method, str) else next(iter(method), None) if isinstance(method, dict) else None
    return build({**PARTS, **noise(named), **work(named), "method": method, **changes})


def test_every_method_is_here():
    assert EXPANSIONS.keys() == METHODS.keys()


@pytest.mark.parametrize("method", EXPANSIONS)
def test_a_name_sets_its_stages_aggregator_and_adapter_and_nothing_else(method):
    plain = build({**PARTS, **noise(method), **work(method), "stages": ["by_examples"]})
    experiment = made(method)
    assert experiment.stages == EXPANSIONS[method]
    assert experiment.task.adapter == ADAPTERS.get(method, Lora())
    assert experiment.task.scope == SCOPES.get(method, Scope())
    check(experiment)
    differing = {key for key, value in dump(experiment).items() if value != dump(plain)[key]}
    assert differing <= {"stages", "task"}
    assert made({method: None}) == made({method: {}}) == experiment


def test_a_method_passes_its_settings_on():
    assert made({"dp_fedavg": {"clip": 0.1, "noise_multiplier": 2}}).stages[1] == GaussianDp(0.1, 2.0)
    assert made({"dp_ftrl": {"separation": 4}}).stages[1] == DpFtrl(1.0, separation=4)
    assert made({"fedprox": {"mu": 0.1}}).stages == (Prox(mu=0.1), ByExamples())
    assert made({"fedadam": {"server_lr": 1, "tau": 0.5}}).stages[0] == Adam(server_lr=1.0, tau=0.5)
    assert made({"scaffold": {"allow": ["adamw"]}}).stages[0] == Scaffold(allow=("adamw",))
    assert made({"scaffold": {"denominator": "cohort"}}).stages[1] == Uniform("cohort")


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("fedprx", "unknown method 'fedprx'; did you mean 'fedprox'?"),
        ({"fedprox": {"mv": 0.1}}, "method fedprox has no setting 'mv'; known: mu"),
        ({"fedadam": {"server_rl": 1}}, "method fedadam has no setting 'server_rl'; did you mean 'server_lr'?"),
        ({"fedprox": {"mu": "x"}}, "method.fedprox.prox.mu is 'x': input should be a valid number"),
        ({"fedprox": {"mu": -1}}, "method.fedprox.prox.mu is -1.0; it must be at least 0 and finite"),
        ({"fedavg": {"lr": 1}}, "method fedavg has no setting 'lr'"),
        ({"fedprox": 0.1}, "method must be a name, or one name with its settings, not {'fedprox': 0.1}"),
        ({"fedprox": {}, "fedavg": {}}, "method must be a name"),
        (3, "method must be a name, or one name with its settings, not 3"),
        (None, "method must be a name"),
    ],
)
def test_a_method_that_is_wrong_is_refused(method, message):
    with pytest.raises(ConfigError) as caught:
        made(method)
    assert message in str(caught.value)


FULL, LORA, NEITHER = ({"task": {"model": "m", "adapter": kind}} for kind in ("full", {"lora": 4}, {}))
FROZEN_B = {"task": {"model": "m", "scope": {"freeze": "*lora_B", "share": "*"}}}
CONFLICTS = [
    ("fedprox", {"stages": ["by_examples"]}, "sets stages to [{'prox': {}}, {'by_examples': {}}]", "['by_examples']"),
    ({"fedprox": {"mu": 1}}, {"stages": [{"prox": 2}, "by_examples"]}, "[{'prox': {'mu': 1}}", "[{'prox': 2}"),
    ("fedit", FULL, "needs the adapter lora", "task.adapter to full"),
    ("full", LORA, "needs the adapter full", "task.adapter to lora"),
    ("fedit", NEITHER, "needs the adapter lora", "task.adapter to {}"),
    ("ffa_lora", FROZEN_B, "sets task.scope.freeze to ['*lora_A']", "it to *lora_B"),
]


@pytest.mark.parametrize(("method", "changes", "own", "other"), CONFLICTS)
def test_a_file_that_sets_it_differently_is_refused_with_both_values(method, changes, own, other):
    with pytest.raises(ConfigError) as caught:
        made(method, **changes)
    name = method if isinstance(method, str) else next(iter(method))
    assert str(caught.value).startswith(f"method {name} ")
    assert str(caught.value).endswith("leave out one of the two")
    before, _, after = str(caught.value).partition(", but the file sets ")
    assert own in before and other in after


def test_an_unknown_aggregator_beside_a_method_is_refused():
    with pytest.raises(ConfigError, match="aggregator: unknown aggregator 'median'"):
        made("fedavg", aggregator="median")


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("fedprox", {"stages": ["prox", "by_examples"]}),
        ("fedprox", {"stages": [{"prox": 0.01}, {"by_examples": {}}], "aggregator": {"sum": {}}}),
        ({"fedprox": {"mu": 1}}, {"stages": [{"prox": {"mu": 1.0}}, "by_examples"]}),
        ("fedavg", {"aggregator": "sum"}),
        ("full", {"task": {"model": "tiny-llama", "adapter": {"full": None}}}),
        ("ffa_lora", {"task": {"model": "tiny-llama", "scope": {"freeze": "*lora_A"}}}),
    ],
)
def test_the_same_said_twice_is_accepted(method, changes):
    assert made(method, **changes) == made(method)


def test_settings_of_the_adapter_that_a_method_needs_are_the_files_own():
    task = {"model": "tiny-llama", "adapter": {"lora": {"rank": 2}}}
    assert made("fedit", task=task).task.adapter == Lora(rank=2)
    task = {"model": "tiny-llama", "adapter": {"soft_prompt": 4}}
    assert made("fedprox", task=task).task.adapter == SoftPrompt(tokens=4)


# Runs. Two local steps at least: with one, FedProx's pull is zero and it is FedAvg.


def two_rounds(method, folder, data, **task):
    """The global weights of two clients of unequal size after two rounds."""
    spec = {
        "task": {"model": "tiny-llama", **task},
        "federation": {"shards": {"data": str(data), "heldout": 0.0, "partition": {"by": "who"}}},
        "work": {"sgd": {"lr": 0.05, "steps": 2, "batch_size": 2, "max_length": 32}},
        "evaluation": {"metrics": []},
        "rounds": 2,
    }
    if METHODS[method].work == "zeroth_order":
        pool = {"pool": 8} if method != "fedmezo" else {}
        spec["work"] = {"zeroth_order": {"lr": 0.01, "steps": 2, "batch_size": 2, "max_length": 32, **pool}}
    result = launch.run(build({**spec, **noise(method), "method": method}), engine="serial", out=folder)
    assert result.summary["rounds"] == 2
    assert tree.finite(result.params)
    return result.params


@pytest.fixture
def data(tmp_path):
    """Five records and three."""
    rows = [
        {"who": who, "prompt": f"{who} {i}?", "response": f"{i}!"} for who, n in (("a", 5), ("b", 3)) for i in range(n)
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "data.jsonl"


def assert_other_methods(results):
    same = {pair for pair in combinations(sorted(results), 2) if tree.equal(results[pair[0]], results[pair[1]])}
    assert same == {pair for names in SAME for pair in combinations(sorted(names & results.keys()), 2)}


TWO = [name for name, method in METHODS.items() if method.adapter == "multi_lora"]
OTHERS = {
    "full": "full",
    "fed_sb": {"lora_xs": {"rank": 2, "alpha": 4}},
    "dp_fed_sb": {"lora_xs": {"rank": 2, "alpha": 4}},
    "slora": {"sparse_lora": {"rank": 2, "alpha": 4, "targets": ["q_proj", "v_proj"]}},
    **{name: {"multi_lora": {"rank": 2, "alpha": 4, "targets": ["q_proj", "v_proj"]}} for name in TWO},
}


def test_names_are_methods_of_their_own(data, tmp_path):
    """fedit is FedAvg on LoRA, to the bit; all others end at other weights, in pairs."""
    lora = {"lora": {"rank": 2, "alpha": 4}}
    results = {
        method: two_rounds(method, tmp_path / method, data, adapter=OTHERS.get(method, lora)) for method in METHODS
    }
    assert_other_methods(results)


@pytest.mark.model
@pytest.mark.slow
def test_names_are_methods_of_their_own_on_smollm2(data, tmp_path, smollm2):
    """Some of each kind; `full` trains the norms alone. Those of one adapter follow each other: it is loaded once."""
    lora = {"lora": {"rank": 2, "alpha": 4, "targets": ["q_proj", "v_proj"]}}
    results = {}
    for method in ("fedavg", "fedit", "flexlora", "fedex_lora", *OTHERS):
        choice = {"adapter": OTHERS.get(method, lora), **({"scope": {"train": ["*norm*"]}} if method == "full" else {})}
        results[method] = two_rounds(method, tmp_path / method, data, model=smollm2, template="plain", **choice)
    assert_other_methods(results)
