"""The list that every stage is on. A new stage adds one entry; a test fails while it is missing."""

from __future__ import annotations

from dataclasses import dataclass

from fedllm.messages.traits import Bracket
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
from fedllm.stages.privacy.gaussian_dp import AdaptiveClip, GaussianDp
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
from tests.conformance import books
from tests.conformance.bench import EQUAL, UNEQUAL, Sizes
from tests.conformance.books import Book


@dataclass(frozen=True)
class Case:
    """One stage.

    Args:
        stage: at settings that change a run.
        book: the paper's loop at these settings; None where the result is random.
        neutral: the stage at settings at which a run is FedAvg to the bit, with clients of `sizes`; None: no such.
        rounding: of a stage that rounds, the largest step of its grid over the largest entry; instead of a book.
        keeps_space: the update keeps the shape of the parameters, so that it has neutral settings or a rounding, or
            says in its docstring why not.
        in_some_rounds: parts that it makes, but not in each; "delta": of some rounds it is empty.
        needs: stages that make what it takes.
        exact: in exact arithmetic a run is FedAvg at these settings, too.
    """

    stage: Stage
    book: type[Book] | None = None
    neutral: Stage | None = None
    sizes: Sizes = UNEQUAL
    rounding: float | None = None
    keeps_space: bool = True
    weigher: Stage = ByExamples()
    needs: tuple[Stage, ...] = ()
    in_some_rounds: frozenset[str] = frozenset()
    exact: bool = False

    def pipeline(self, stage: Stage | None = None) -> tuple[Stage, ...]:
        """A list of stages around the case's own, or around `stage`."""
        chosen = self.stage if stage is None else stage
        others = () if chosen.traits.bracket is Bracket.WEIGH else (self.weigher,)
        own = (chosen, *self.needs) if chosen.traits.bracket is Bracket.LOCAL else (*self.needs, chosen)
        return tuple(sorted((*own, *others), key=lambda s: s.traits.bracket))


HUGE = 2.0**40  # Adagrad: Δ² is lost in the rounding of tau², so the denominator stays 2 tau
OWN = (Keep(("*.personal.*",)),)
ROUNDED = FixedPoint(ring=16, bound=0.5, max_weight=600.0)  # 54 levels for one client

CASES: dict[str, Case] = {
    "keep": Case(Keep(("*lora_B",)), books.KeepBook, neutral=Keep(("*.no_such_leaf",))),
    "ditto": Case(Ditto(lam=2.0), books.DittoBook, needs=OWN),
    "personal_last": Case(PersonalLast(), books.PersonalLastBook, needs=OWN, in_some_rounds=frozenset({"delta"})),
    "rest_of_world": Case(RestOfWorld(), books.RestOfWorldBook, needs=OWN, weigher=Uniform()),
    "fdlora": Case(Fdlora(every=1, fuse=False), books.FdloraBook, needs=OWN, weigher=Uniform()),
    "seed_pool": Case(SeedPool(), books.Book, keeps_space=False, exact=True),
    "prox": Case(Prox(mu=2.0), books.ProxBook, neutral=Prox(mu=0)),
    "scaffold": Case(Scaffold(), books.ScaffoldBook, weigher=Uniform()),
    "dyn": Case(Dyn(alpha=0.5), books.DynBook, weigher=Uniform()),
    "momentum": Case(Momentum(beta=0.5, server_lr=2.0), books.MomentumBook, neutral=Momentum(beta=0, server_lr=1)),
    "adagrad": Case(
        Adagrad(beta1=0.5, tau=0.01, server_lr=0.05),
        books.AdaptiveBook,
        neutral=Adagrad(beta1=0, tau=HUGE, server_lr=2 * HUGE),
    ),
    "adam": Case(
        Adam(beta1=0.5, beta2=0.9, tau=0.01, server_lr=0.05),
        books.AdamBook,
        neutral=Adam(beta1=0, beta2=1, tau=0.5, server_lr=1),
    ),
    "yogi": Case(
        Yogi(beta1=0.5, beta2=0.9, tau=0.01, server_lr=0.05),
        books.YogiBook,
        neutral=Yogi(beta1=0, beta2=1, tau=0.5, server_lr=1),
    ),
    "nesterov": Case(
        Nesterov(server_lr=0.7, momentum=0.9), books.NesterovBook, neutral=Nesterov(server_lr=1, momentum=0)
    ),
    "top_k": Case(TopK(fraction=0.1), books.TopKBook, neutral=TopK(fraction=1)),
    "by_examples": Case(ByExamples(), books.Book, neutral=ByExamples()),
    "uniform": Case(Uniform(), books.UniformBook, neutral=Uniform(), sizes=EQUAL),
    "quantize": Case(Quantize(bits=4), rounding=1 / 7),
    "lora_pad": Case(
        LoraPad(), books.Book, neutral=LoraPad()
    ),  # of unequal ranks: tests/stages/lora/test_unequal_ranks.py
    "lora_fair": Case(LoraFair(penalty=0.3), books.LoraFairBook, keeps_space=False),
    "lora_stack": Case(LoraStack(), books.FlexLoraBook, keeps_space=False),
    "lora_prune": Case(LoraPrune(gamma=0.5, penalty=1.0), books.HetLoraBook),
    "lora_cap": Case(LoraCap(bits=(32,)), books.HaflqBook, needs=(LoraPad("contributors"),)),
    "lora_product": Case(LoraProduct(), books.FlexLoraBook, keeps_space=False),
    "lora_merge": Case(LoraMerge(), books.FloraBook, keeps_space=False),
    "lora_residual": Case(LoraResidual(), books.FedexBook, keeps_space=False),
    "sparse_first": Case(SparseFirst(rounds=1), books.SparseFirstBook),
    # Without noise, which no loop could repeat: tests/stages/privacy has what is added.
    "gaussian_dp": Case(
        GaussianDp(clip=0.02, noise_multiplier=0.0, adaptive=AdaptiveClip(count_noise=1.0, quantile=0.8)),
        books.AdaptiveClipBook,
        neutral=GaussianDp(clip=2.0**40, noise_multiplier=0.0),
        sizes=EQUAL,
        weigher=Uniform("expected"),
    ),
    "dp_ftrl": Case(
        DpFtrl(clip=0.02, noise_multiplier=0.0),
        books.ClippedBook,
        neutral=DpFtrl(clip=2.0**40, noise_multiplier=0.0),
        sizes=EQUAL,
        weigher=Uniform("cohort"),
    ),
    **{
        name: Case(
            kind(clip=0.02, noise_multiplier=0.0),
            books.ClippedBook,
            neutral=kind(clip=2.0**40, noise_multiplier=0.0),
            sizes=EQUAL,
            weigher=Uniform("cohort"),
        )
        for name, kind in {"local_gaussian": LocalGaussian, "discrete_noise": DiscreteNoise}.items()
    },
    "fixed_point": Case(ROUNDED, rounding=3 * ROUNDED.bound / ROUNDED.levels(1)),
    "selective_encryption": Case(
        SelectiveEncryption(0.3, "drop"),
        books.SelectiveBook,
        neutral=SelectiveEncryption(1.0, "drop"),
        keeps_space=False,
        in_some_rounds=frozenset({"sensitivity"}),
    ),
    "lora_svd": Case(LoraSvd(), books.SvdBook),  # with lora_A held still: tests/papers/test_fedsvd.py
}
