"""Every name that an experiment may use: one table per noun, and the presets.

A class from elsewhere is named by its dotted path, `my_package.my_module:MyStage`, in Python only: an experiment file
names what is in these tables.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from fedllm.aggregate import Aggregator, Sum
from fedllm.engine import Engine
from fedllm.engines.batched import Batched
from fedllm.engines.ray import Ray
from fedllm.engines.serial import Serial
from fedllm.experiment import Schedule, Synchronous
from fedllm.federation import Federation
from fedllm.federations.records import PACKAGED
from fedllm.federations.sampling import All, PoissonSampling, Sampling, UniformSampling
from fedllm.federations.shards import Shards
from fedllm.federations.split import Split
from fedllm.federations.splits.by import By
from fedllm.federations.splits.dirichlet import Dirichlet
from fedllm.federations.splits.iid import Iid
from fedllm.federations.splits.pathological import Pathological
from fedllm.federations.splits.shard import Shard
from fedllm.federations.splits.size_skew import SizeSkew
from fedllm.stage import Stage
from fedllm.stages.adagrad import Adagrad
from fedllm.stages.adam import Adam
from fedllm.stages.by_examples import ByExamples
from fedllm.stages.dyn import Dyn
from fedllm.stages.keep import Keep
from fedllm.stages.lora_cap import LoraCap
from fedllm.stages.lora_fair import LoraFair
from fedllm.stages.lora_merge import LoraMerge
from fedllm.stages.lora_pad import LoraPad
from fedllm.stages.lora_product import LoraProduct
from fedllm.stages.lora_prune import LoraPrune
from fedllm.stages.lora_residual import LoraResidual
from fedllm.stages.lora_stack import LoraStack
from fedllm.stages.lora_svd import LoraSvd
from fedllm.stages.momentum import Momentum
from fedllm.stages.nesterov import Nesterov
from fedllm.stages.prox import Prox
from fedllm.stages.quantize import Quantize
from fedllm.stages.scaffold import Scaffold
from fedllm.stages.sparse_first import SparseFirst
from fedllm.stages.top_k import TopK
from fedllm.stages.uniform import Uniform
from fedllm.stages.yogi import Yogi
from fedllm.tasks.adapter import Adapter
from fedllm.tasks.adapters.bottleneck import Bottleneck
from fedllm.tasks.adapters.lora import Lora
from fedllm.tasks.adapters.lora_xs import LoraXs
from fedllm.tasks.adapters.peft import Peft
from fedllm.tasks.adapters.prefix import Prefix
from fedllm.tasks.adapters.soft_prompt import SoftPrompt
from fedllm.tasks.adapters.sparse_lora import SparseLora
from fedllm.tasks.adapters.weights import BitFit, Full, Norms
from fedllm.tasks.base import ALIASES
from fedllm.tasks.objectives import Lm, Objective, Sft
from fedllm.work import Work
from fedllm.works.sgd import Sgd

Table = Mapping[str, type]

STAGES: Table = {
    "keep": Keep,
    "prox": Prox,
    "scaffold": Scaffold,
    "dyn": Dyn,
    "momentum": Momentum,
    "adagrad": Adagrad,
    "adam": Adam,
    "yogi": Yogi,
    "nesterov": Nesterov,
    "top_k": TopK,
    "by_examples": ByExamples,
    "uniform": Uniform,
    "quantize": Quantize,
    "lora_fair": LoraFair,
    "lora_pad": LoraPad,
    "lora_stack": LoraStack,
    "lora_prune": LoraPrune,
    "lora_cap": LoraCap,
    "lora_product": LoraProduct,
    "lora_svd": LoraSvd,
    "lora_merge": LoraMerge,
    "lora_residual": LoraResidual,
    "sparse_first": SparseFirst,
}
NOUNS: Mapping[type, Table] = {
    Stage: STAGES,
    Aggregator: {"sum": Sum},
    Work: {"sgd": Sgd},
    Federation: {"shards": Shards},
    Split: {
        "iid": Iid,
        "dirichlet": Dirichlet,
        "by": By,
        "size_skew": SizeSkew,
        "pathological": Pathological,
        "shard": Shard,
    },
    Sampling: {"all": All, "uniform": UniformSampling, "poisson": PoissonSampling},
    Adapter: {
        "lora": Lora,
        "lora_xs": LoraXs,
        "sparse_lora": SparseLora,
        "bottleneck": Bottleneck,
        "prefix": Prefix,
        "soft_prompt": SoftPrompt,
        "full": Full,
        "norms": Norms,
        "bitfit": BitFit,
        "peft": Peft,
    },
    Objective: {"sft": Sft, "lm": Lm},
    Schedule: {"synchronous": Synchronous},
    Engine: {"serial": Serial, "batched": Batched, "ray": Ray},
}

# Keys that may hold a path, each with the names that are none.
PATHS: Mapping[str, Collection[str]] = {
    "task.model": ALIASES,
    "task.adapter.lora.init_from": (),
    "federation.shards.data": PACKAGED,
    "federation.shards.heldout": PACKAGED,
}


@dataclass(frozen=True)
class Method:
    """A preset: what a method's name sets, and where it comes from.

    `adapter`: the kind that it needs, if any; `adapter_sets`: settings of it. `scope`: keys of `task.scope`.
    """

    stages: tuple[Mapping[str, Mapping[str, Any]] | str, ...]
    paper: str
    adapter: str | None = None
    aggregator: str = "sum"
    adapter_sets: Mapping[str, Any] = field(default_factory=dict)
    scope: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    summary: str = field(default="")


_REDDI = "Reddi et al. 2021, arXiv:2003.00295"
METHODS: Mapping[str, Method] = {
    "fedavg": Method(("by_examples",), "McMahan et al. 2017, arXiv:1602.05629"),
    "fedprox": Method(("prox", "by_examples"), "Li et al. 2020, arXiv:1812.06127"),
    "scaffold": Method(("scaffold", "uniform"), "Karimireddy et al. 2020, arXiv:1910.06378"),
    "fedavgm": Method(("momentum", "by_examples"), "Hsu et al. 2019, arXiv:1909.06335"),
    "fedadagrad": Method(("adagrad", "by_examples"), _REDDI),
    "fedadam": Method(("adam", "by_examples"), _REDDI),
    "fedyogi": Method(("yogi", "by_examples"), _REDDI),
    "feddyn": Method(("dyn", "uniform"), "Acar et al. 2021, arXiv:2111.04263"),
    "fedit": Method(("by_examples",), "Zhang et al. 2024, arXiv:2305.05644", adapter="lora"),
    "ffa_lora": Method(
        ("by_examples",), "Sun et al. 2024, arXiv:2403.12313", adapter="lora", scope={"freeze": ("*lora_A",)}
    ),
    "rolora": Method(
        ("by_examples",),
        "Chen et al. 2025, arXiv:2502.01755",
        adapter="lora",
        scope={"alternate": ("*lora_B", "*lora_A")},
    ),
    "fedsa_lora": Method(
        ("by_examples",), "Guo et al. 2024, arXiv:2410.01463", adapter="lora", scope={"share": ("*lora_A",)}
    ),
    "lora_fair": Method(("lora_fair", "by_examples"), "Bian et al. 2024, arXiv:2411.14961", adapter="lora"),
    "zero_padding": Method(
        ("lora_pad", "by_examples"), "the baseline of Cho et al. 2024, arXiv:2401.06432", adapter="lora"
    ),
    "rbla": Method(
        ({"lora_pad": {"mean": "contributors"}}, "by_examples"), "Chen et al. 2024, arXiv:2408.08699", adapter="lora"
    ),
    "flexlora": Method(("lora_stack", "by_examples"), "Bai et al. 2024, arXiv:2402.11505", adapter="lora"),
    "raflora": Method(
        ({"lora_stack": {"mean": "contributors"}}, "by_examples"), "2026, arXiv:2602.13486", adapter="lora"
    ),
    "hetlora": Method(("lora_prune", "by_examples"), "Cho et al. 2024, arXiv:2401.06432", adapter="lora"),
    "haflq": Method(
        ({"lora_pad": {"mean": "contributors"}}, "by_examples", "lora_cap"),
        "Su et al. 2024, arXiv:2411.06581",
        adapter="lora",
    ),
    "flora": Method(("lora_merge", "by_examples"), "Wang et al. 2024, arXiv:2409.05976", adapter="lora"),
    "fedex_lora": Method(("lora_residual", "by_examples"), "Singhal et al. 2024, arXiv:2410.09432", adapter="lora"),
    "slora": Method(("sparse_first", "by_examples"), "Babakniya et al. 2023, arXiv:2308.06522", adapter="sparse_lora"),
    "federa": Method(
        ("by_examples",), "Yan et al. 2024, arXiv:2404.18848", adapter="lora", adapter_sets={"init": "singular"}
    ),
    "fedsvd": Method(
        ("lora_svd", "by_examples"), "Lee et al. 2025, arXiv:2505.12805", adapter="lora", scope={"hold": ("*lora_A",)}
    ),
    "fed_sb": Method(("by_examples",), "Singhal et al. 2025, arXiv:2502.15436", adapter="lora_xs"),
    "full": Method(("by_examples",), "McMahan et al. 2017, arXiv:1602.05629", adapter="full"),
}


def name_of(component: object) -> str:
    """The catalog name of a component."""
    for table in NOUNS.values():
        for name, cls in table.items():
            if type(component) is cls:
                return name
    return f"{type(component).__module__}:{type(component).__qualname__}"
