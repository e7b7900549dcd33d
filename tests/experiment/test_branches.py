"""Adapters with several branches: what is refused before a model loads, and what goes together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fedllm.errors import CheckError
from fedllm.experiment.checks.check import check
from fedllm.experiment.config_file import build
from fedllm.experiment.methods import METHODS

TWO = [name for name, method in METHODS.items() if method.adapter == "multi_lora"]
PARTS: dict[str, Any] = {
    "task": {"model": "tiny-llama", "adapter": "multi_lora"},
    "federation": {"shards": {"data": "quickstart", "partition": {"by": "organisation"}}},
    "work": {"sgd": {"steps": 1}},
    "rounds": 4,
}
OWN = {"keep": ["*.personal.*"]}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"stages": [{"ditto": {"own": "mine"}}, OWN, "uniform"]}, "ditto.own is 'mine', but .* the branches shared"),
        ({"stages": [{"ditto": {"shared": "shred"}}, OWN, "uniform"]}, "did you mean 'shared'"),
        ({"stages": ["ditto", "uniform"]}, "nothing keeps it; put keep"),
        ({"stages": ["rest_of_world", OWN, "by_examples"]}, "rest_of_world"),
        ({"stages": [{"personal_last": 4}, OWN, "uniform"]}, "personal_last.rounds is 4 of 4 rounds"),
        ({"task": {"model": "tiny-llama"}, "stages": ["ditto", OWN, "uniform"]}, "works on the adapter multi_lora"),
        ({"method": "ditto", "work": {"dp_sgd": {"steps": 1, "clip": 1.0, "noise_multiplier": 1.0}}}, "for one pass"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(changes: dict[str, Any], reason: str) -> None:
    experiment = build({**PARTS, **changes})
    with pytest.raises(CheckError, match=reason):
        check(experiment)


# Each method with what may stand beside it: bytes, drift, server optimisers, privacy, secure sums.
NOISE = {"gaussian_dp": {"clip": 1.0, "noise_multiplier": 1.0}}
BESIDE = [{"top_k": 0.5}, {"quantize": 8}, "prox", "momentum", "adam", NOISE, "fixed_point", "scaffold"]
TOGETHER = {
    "ditto": "top_k quantize prox momentum adam gaussian_dp fixed_point scaffold",
    "feddpa_t": "top_k quantize prox momentum adam gaussian_dp fixed_point scaffold",
    "feddpa_f": "top_k quantize prox momentum adam gaussian_dp fixed_point",
    "fdlora": "top_k quantize prox momentum adam gaussian_dp fixed_point",
    "fedalt": "top_k quantize prox fixed_point",
}


@pytest.mark.parametrize("method", TWO)
def test_what_goes_with_each_method(method: str) -> None:
    stages = build({**PARTS, "method": method}).stages
    passing = []
    for beside in BESIDE:
        name = next(iter(beside)) if isinstance(beside, dict) else beside
        try:
            check(together(method, stages, beside, name))
            passing.append(name)
        except CheckError:
            pass
    assert passing == TOGETHER[method].split()


def together(method: str, stages: Any, beside: Any, name: str) -> Any:
    """The method's stages and one more, in its bracket, with what this one needs."""
    made = build({**PARTS, "stages": [beside, {"uniform": {"denominator": "expected"}}]})
    extra = next(stage for stage in made.stages if type(stage).__name__ != "Uniform")
    weigher = made.stages[1] if made.stages[0] is extra else made.stages[0]
    given = build({**PARTS, "method": method})
    rest = [stage for stage in stages if type(stage).__name__ not in ("ByExamples", "Uniform")]
    use = weigher if name == "gaussian_dp" else next(s for s in stages if type(s).__name__ in ("ByExamples", "Uniform"))
    use = weigher.__class__() if name == "scaffold" else use
    return replace(given, stages=tuple(sorted([*rest, extra, use], key=lambda stage: stage.traits.bracket)))
