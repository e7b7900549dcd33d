"""Every name that an experiment may use: one table per noun, and the presets.

A class from elsewhere is named by its dotted path, `my_package.my_module:MyStage`, in Python only: an experiment file
names what is in these tables.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from fedllm.aggregators.base import Aggregator
from fedllm.aggregators.bucketed import Bucketed
from fedllm.aggregators.homomorphic_sum import HomomorphicSum
from fedllm.aggregators.secure_sum import SecureSum
from fedllm.aggregators.sum import Sum
from fedllm.data.federation import Federation
from fedllm.data.partitioners.base import Partitioner
from fedllm.data.partitioners.by import By
from fedllm.data.partitioners.dirichlet import Dirichlet
from fedllm.data.partitioners.iid import Iid
from fedllm.data.partitioners.pathological import Pathological
from fedllm.data.partitioners.shard import Shard
from fedllm.data.partitioners.size_skew import SizeSkew
from fedllm.data.records import PACKAGED
from fedllm.data.sampling import All, PoissonSampling, RotationSampling, Sampling, UniformSampling
from fedllm.data.shards import Shards
from fedllm.experiment.schedules import Schedule, Synchronous
from fedllm.models.adapters.base import Adapter
from fedllm.models.adapters.bottleneck import Bottleneck
from fedllm.models.adapters.lora import Lora
from fedllm.models.adapters.lora_xs import LoraXs
from fedllm.models.adapters.multi_lora import MultiLora
from fedllm.models.adapters.peft import Peft
from fedllm.models.adapters.prefix import Prefix
from fedllm.models.adapters.soft_prompt import SoftPrompt
from fedllm.models.adapters.sparse_lora import SparseLora
from fedllm.models.adapters.weights import BitFit, Full, Norms
from fedllm.models.base_models.load import ALIASES
from fedllm.models.objectives.base import Objective
from fedllm.models.objectives.language_modeling import Lm
from fedllm.models.objectives.sft import Sft
from fedllm.stages.base import Stage
from fedllm.stages.client_drift.dyn import Dyn
from fedllm.stages.client_drift.prox import Prox
from fedllm.stages.client_drift.scaffold import Scaffold
from fedllm.stages.compression.quantize import Quantize
from fedllm.stages.compression.top_k import TopK
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
from fedllm.stages.privacy.discrete_noise import DiscreteNoise
from fedllm.stages.privacy.dp_ftrl import DpFtrl
from fedllm.stages.privacy.fixed_point import FixedPoint
from fedllm.stages.privacy.gaussian_dp import GaussianDp
from fedllm.stages.privacy.local_gaussian import LocalGaussian
from fedllm.stages.privacy.selective_encryption import SelectiveEncryption
from fedllm.stages.server_optimizers.adagrad import Adagrad
from fedllm.stages.server_optimizers.adam import Adam
from fedllm.stages.server_optimizers.momentum import Momentum
from fedllm.stages.server_optimizers.nesterov import Nesterov
from fedllm.stages.server_optimizers.yogi import Yogi
from fedllm.stages.weighting.by_examples import ByExamples
from fedllm.stages.weighting.uniform import Uniform
from fedllm.stages.zeroth_order.seed_pool import SeedPool
from fedllm.training.base import Work
from fedllm.training.dp_sgd import DpSgd
from fedllm.training.sgd import Sgd
from fedllm.training.zeroth_order import ZerothOrder

Table = Mapping[str, type]

STAGES: Table = {
    "keep": Keep,
    "ditto": Ditto,
    "fdlora": Fdlora,
    "personal_last": PersonalLast,
    "rest_of_world": RestOfWorld,
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
    "seed_pool": SeedPool,
    "gaussian_dp": GaussianDp,
    "dp_ftrl": DpFtrl,
    "local_gaussian": LocalGaussian,
    "discrete_noise": DiscreteNoise,
    "selective_encryption": SelectiveEncryption,
    "fixed_point": FixedPoint,
}
NOUNS: Mapping[type, Table] = {
    Stage: STAGES,
    Aggregator: {"sum": Sum, "secure_sum": SecureSum, "bucketed": Bucketed, "homomorphic_sum": HomomorphicSum},
    Work: {"sgd": Sgd, "dp_sgd": DpSgd, "zeroth_order": ZerothOrder},
    Federation: {"shards": Shards},
    Partitioner: {
        "iid": Iid,
        "dirichlet": Dirichlet,
        "by": By,
        "size_skew": SizeSkew,
        "pathological": Pathological,
        "shard": Shard,
    },
    Sampling: {"all": All, "uniform": UniformSampling, "poisson": PoissonSampling, "rotation": RotationSampling},
    Adapter: {
        "lora": Lora,
        "lora_xs": LoraXs,
        "sparse_lora": SparseLora,
        "multi_lora": MultiLora,
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
}

# The lists of `fedllm ls`, and whatever else speaks of names.
TABLES: Mapping[str, Mapping[str, Any]] = {
    "stages": STAGES,
    "aggregators": NOUNS[Aggregator],
    "works": NOUNS[Work],
    "adapters": NOUNS[Adapter],
    "models": ALIASES,
    "data": PACKAGED,
}

# Keys that may hold a path, each with the names that are none.
PATHS: Mapping[str, Collection[str]] = {
    "task.model": ALIASES,
    "task.adapter.lora.init_from": (),
    "federation.shards.data": PACKAGED,
    "federation.shards.heldout": PACKAGED,
}


def name_of(component: object) -> str:
    """The catalog name of a component."""
    for table in NOUNS.values():
        for name, cls in table.items():
            if type(component) is cls:
                return name
    return f"{type(component).__module__}:{type(component).__qualname__}"
