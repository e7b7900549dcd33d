"""Methods by name: presets of stages, aggregator, adapter and scope, each with its paper."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Method:
    """A preset: what a method's name sets, and where it comes from.

    `adapter`, `work`: the kinds that it needs, if any; `adapter_sets`: settings of the adapter. `scope`: keys of
    `task.scope`.
    """

    stages: tuple[Mapping[str, Mapping[str, Any]] | str, ...]
    paper: str
    adapter: str | None = None
    work: str | None = None
    aggregator: str = "sum"
    adapter_sets: Mapping[str, Any] = field(default_factory=dict)
    scope: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    summary: str = field(default="")


_REDDI = "Reddi et al. 2021, arXiv:2003.00295"
# Client-level differential privacy. The noise is left to `demands.privacy`; the clip is a first guess, to be replaced.
_EXPECTED: Mapping[str, Mapping[str, Any]] = {"uniform": {"denominator": "expected"}}
_PRIVATE = (_EXPECTED, {"gaussian_dp": {"clip": 1.0}})

# Two branches: the first travels, the second stays with its client, as does what mixes them.
_OWN: Mapping[str, Mapping[str, Any]] = {"keep": {"patterns": ["*.personal.*", "*.router", "mixer.*"]}}
_SHARED, _PERSONAL = {"train": ["*.shared.*"]}, {"train": ["*.personal.*"]}
_BESIDE = {"train": ["*.personal.*"], "beside": ["*.shared.*"]}
_DPA = "Yang et al. 2024, arXiv:2403.19211"


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
    "ditto": Method(
        ("ditto", _OWN, "by_examples"),
        "Li et al. 2021, arXiv:2012.04221",
        adapter="multi_lora",
        adapter_sets={"weights": [0.0, 1.0]},
        scope={"phases": (_PERSONAL, _SHARED)},
    ),
    "feddpa_t": Method(
        (_OWN, "uniform"),
        _DPA,
        adapter="multi_lora",
        adapter_sets={"mixer": "similarity", "weights": [0.5, 0.5]},
        scope={"phases": (_SHARED, _BESIDE)},
    ),
    "feddpa_f": Method(
        ("personal_last", _OWN, "uniform"),
        _DPA,
        adapter="multi_lora",
        adapter_sets={"mixer": "similarity"},
        scope={"phases": (_SHARED, _PERSONAL)},
    ),
    "fdlora": Method(
        ("fdlora", _OWN, {"nesterov": {"server_lr": 1.0, "momentum": 0.5, "start": 1}}, "uniform"),
        "2024, arXiv:2406.07925",
        adapter="multi_lora",
        adapter_sets={"mixer": "fused"},
        scope={"phases": (_PERSONAL, _SHARED)},
    ),
    "fedalt": Method(
        ("rest_of_world", _OWN, "uniform"),
        "Bian et al. 2025, arXiv:2503.11880",
        adapter="multi_lora",
        adapter_sets={"mixer": "router"},
        scope={"hold": ("*.shared.*",)},
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
    "fedmezo": Method(("by_examples",), "Ling et al. 2024, arXiv:2402.05926", adapter="lora", work="zeroth_order"),
    "fedkseed": Method(("seed_pool", "by_examples"), "Qin et al. 2024, arXiv:2312.06353", work="zeroth_order"),
    "decomfl": Method(("seed_pool", "uniform"), "Li et al. 2024, arXiv:2405.15861", work="zeroth_order"),
    "dp_fedavg": Method(_PRIVATE, "McMahan et al. 2018, arXiv:1710.06963"),
    "dp_ffa_lora": Method(
        _PRIVATE, "Sun et al. 2024, arXiv:2403.12313", adapter="lora", scope={"freeze": ("*lora_A",)}
    ),
    "dp_fedsvd": Method(
        ("lora_svd", *_PRIVATE), "Lee et al. 2025, arXiv:2505.12805", adapter="lora", scope={"hold": ("*lora_A",)}
    ),
    "dp_fed_sb": Method(_PRIVATE, "Singhal et al. 2025, arXiv:2502.15436", adapter="lora_xs"),
    "dp_ftrl": Method((_EXPECTED, {"dp_ftrl": {"clip": 1.0}}), "Kairouz et al. 2021, arXiv:2103.00039"),
    # The products are noised once, and their largest singular values taken of what is public then. The paper's own
    # noise, before the last orthonormalisation of a subspace iteration on the clean sum, is not built: how far one
    # client turns that subspace has no bound without a gap between singular values.
    "fedpower": Method(("lora_product", *_PRIVATE), "2026, arXiv:2605.08443", adapter="lora"),
}
