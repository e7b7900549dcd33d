"""The table of LoRA aggregations and what goes with them, written into its page when the site is built.

MkDocs runs this file as a hook. A row is a method of the catalog that needs the adapter lora; a column is a stage that
may be put beside it, clients of unequal ranks, or secure sums. What a cell says is what `check` says of the two
together, and the tests run every cell: see `tests/compat`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from fedllm.aggregators.secure_sum import SecureSum
from fedllm.errors import CheckError
from fedllm.experiment import config_file
from fedllm.experiment.catalog import NOUNS, name_of
from fedllm.experiment.checks.check import check, check_profiles
from fedllm.experiment.methods import METHODS
from fedllm.experiment.record import Demands, Experiment
from fedllm.messages.context import Profile
from fedllm.messages.traits import Bracket
from fedllm.models.adapters.base import Adapter
from fedllm.models.adapters.lora import Lora
from fedllm.stages.base import Stage
from fedllm.stages.client_drift.dyn import Dyn
from fedllm.stages.client_drift.prox import Prox
from fedllm.stages.client_drift.scaffold import Scaffold
from fedllm.stages.compression.quantize import Quantize
from fedllm.stages.compression.top_k import TopK
from fedllm.stages.privacy.base import PrivateStage
from fedllm.stages.privacy.discrete_noise import DiscreteNoise
from fedllm.stages.privacy.dp_ftrl import DpFtrl
from fedllm.stages.privacy.fixed_point import FixedPoint
from fedllm.stages.privacy.gaussian_dp import GaussianDp
from fedllm.stages.privacy.local_gaussian import LocalGaussian
from fedllm.stages.server_optimizers.adagrad import Adagrad
from fedllm.stages.server_optimizers.adam import Adam
from fedllm.stages.server_optimizers.momentum import Momentum
from fedllm.stages.server_optimizers.nesterov import Nesterov
from fedllm.stages.server_optimizers.yogi import Yogi
from fedllm.stages.weighting.uniform import Uniform

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

PLACE = "<!-- compatibility -->"
RANKS = "unequal ranks"
SECURE = "secure sums"
PARTNERS: tuple[Stage, ...] = (
    *(Momentum(), Adagrad(), Adam(), Yogi(), Nesterov()),
    *(Prox(), Scaffold(), Dyn(), TopK(0.1), Quantize(4)),
    *(GaussianDp(1.0, 1.0), DpFtrl(1.0, 1.0), LocalGaussian(1.0, 1.0), DiscreteNoise(1.0, 1.0)),
)
EQUAL_WEIGHTS = (Scaffold, Dyn, PrivateStage)  # as their own presets have them
PROFILES = {"bank": Profile(), "clinic": Profile(rank=4)}
SPEC = {
    "task": {"model": "tiny-llama", "dtype": "float64"},
    "federation": {"shards": {"data": "quickstart"}},
    "work": {"sgd": {"lr": 0.1, "steps": 2, "batch_size": 2, "max_length": 32}},
}


class Cell(NamedTuple):
    """A method beside a partner. `experiment` is one that `check` lets pass; None: refused, for a reason."""

    experiment: Experiment | None = None
    reason: str = ""


def aggregations() -> list[str]:
    """The rows: every method that needs the adapter lora, or one that is built on it, trains by gradients, and has no
    noise of its own: with noise it is a cell of its row."""
    kinds = {name for name, kind in NOUNS[Adapter].items() if issubclass(kind, Lora)}
    found = [name for name, method in METHODS.items() if method.adapter in kinds and method.work is None]
    return [name for name in found if not any(isinstance(stage, PrivateStage) for stage in alone(name).stages)]


def columns() -> list[str]:
    """The partners' names, the unequal ranks, and sums that hide updates."""
    return [*map(name_of, PARTNERS), RANKS, SECURE]


def alone(method: str) -> Experiment:
    """A method as its preset has it."""
    return config_file.build({**SPEC, "method": method})


def cell(method: str, column: str) -> Cell:
    """What `check` says. The reason is that of the partner's first place."""
    if column == RANKS:
        return _with_ranks(alone(method))
    if column == SECURE:
        return _hidden(alone(method))
    (partner,) = (stage for stage in PARTNERS if name_of(stage) == column)
    return beside(alone(method), partner)


def beside(experiment: Experiment, partner: Stage) -> Cell:
    """The partner among the stages of its bracket: at the first of its places that `check` lets pass."""
    reasons = []
    if isinstance(partner, DiscreteNoise):  # parts of the noise hide nothing but in a sum
        experiment = secret(experiment)
    for stages in placed(weighed(experiment, partner).stages, partner):
        try:
            check(replace(experiment, stages=stages))
        except CheckError as error:
            reasons.append(str(error))
        else:
            return Cell(replace(experiment, stages=stages))
    return Cell(reason=reasons[0])


def weighed(experiment: Experiment, partner: Stage) -> Experiment:
    """The experiment, all clients weighing the same beside a partner whose preset has it so."""
    if not isinstance(partner, EQUAL_WEIGHTS):
        return experiment
    weigher = Uniform("expected") if isinstance(partner, PrivateStage) else Uniform()
    equal = (weigher if stage.traits.bracket is Bracket.WEIGH else stage for stage in experiment.stages)
    return replace(experiment, stages=tuple(equal))


def placed(stages: Sequence[Stage], partner: Stage) -> Iterator[tuple[Stage, ...]]:
    """A list of stages with one more, at each place of its bracket, the outermost first."""
    first = sum(stage.traits.bracket < partner.traits.bracket for stage in stages)
    last = sum(stage.traits.bracket <= partner.traits.bracket for stage in stages)
    for place in range(first, last + 1):
        yield (*stages[:place], partner, *stages[place:])


def _with_ranks(experiment: Experiment) -> Cell:
    try:
        check(experiment)
        check_profiles(experiment, PROFILES)
    except CheckError as error:
        return Cell(reason=str(error))
    return Cell(experiment)


def _hidden(experiment: Experiment) -> Cell:
    """Under a demand for secrecy, with integers behind all stages."""
    hidden = replace(secret(experiment), demands=Demands(secrecy=True))
    try:
        check(hidden)
    except CheckError as error:
        return Cell(reason=str(error))
    return Cell(hidden)


def secret(experiment: Experiment) -> Experiment:
    """The experiment with a secure sum."""
    return replace(experiment, stages=(*experiment.stages, FixedPoint(max_weight=1000)), aggregator=SecureSum())


def table() -> str:
    """Markdown: the table, and its reasons by number."""
    reasons: list[str] = []
    lines = [f"| method | {' | '.join(columns())} |", "| --- " * (1 + len(columns())) + "|"]
    for method in aggregations():
        cells = [_words(cell(method, column), column, reasons) for column in columns()]
        lines.append(f"| `{method}` | {' | '.join(cells)} |")
    listed = [f"{number}. {reason}" for number, reason in enumerate(reasons, 1)]
    return "\n".join([*lines, "", *listed])


def _words(found: Cell, column: str, reasons: list[str]) -> str:
    if found.experiment is not None:
        return "yes"
    reason = found.reason.replace(column, "STAGE")
    if reason not in reasons:
        reasons.append(reason)
    return f"no ({reasons.index(reason) + 1})"


def filled(markdown: str) -> str:
    """A page with its table."""
    return markdown.replace(PLACE, table()) if PLACE in markdown else markdown


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Write the table where a page asks for it."""
    return filled(markdown)
