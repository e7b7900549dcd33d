"""Broken copies of every stage, each with the check that must catch it. They keep the suite honest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch

from fedllm.errors import RunError
from fedllm.messages.update import Part, Update
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
from fedllm.stages.weighting import weighted_mean
from fedllm.stages.weighting.by_examples import ByExamples
from fedllm.stages.weighting.uniform import Uniform
from fedllm.stages.zeroth_order.seed_pool import SeedPool
from fedllm.tensors import low_rank, tree
from fedllm.tensors.wire_format import WireFormat
from tests.conformance.table import HUGE, Case


@dataclass(frozen=True)
class Twin:
    """A broken stage; the catalog's name of the sound one; the check that fails."""

    of: str
    stage: Stage
    caught_by: str
    neutral: Stage | None = None
    error: type[Exception] = AssertionError

    def case(self, sound: Case) -> Case:
        return replace(sound, stage=self.stage, neutral=self.neutral)


class KeepsNothing(Keep):
    """Forgets its leaves between rounds."""

    def encode(self, update, scratch, memory, local):
        return super().encode(update, scratch, memory, local)[0], memory


class KeepsEverything(Keep):
    """Fits every leaf, whatever its patterns."""

    def broadcast(self, params, state, ctx):
        return {}, {}


class DittoSign(Ditto):
    """Pushes away from what was sent."""

    def grads(self, grads, params, scratch):
        pushed = {n: g - self.lam * (params[n] - scratch[n]) for n, g in grads.items() if n in scratch}
        return {**grads, **pushed}


class NeverLast(PersonalLast):
    """Trains the shared branch to the end."""

    def trains_in_round(self, name, round, rounds):
        return ".shared." in name


class WholeWorld(RestOfWorld):
    """Forgets to take the client itself out."""

    def receive(self, params, extra, memory, local):
        return params, super().receive(params, extra, memory, local)[1]


class FdloraForgets(Fdlora):
    """Sends nothing of the first round."""

    def encode(self, update, scratch, memory, local):
        return (update, memory) if local.ctx.round == 0 else super().encode(update, scratch, memory, local)


class SeedSign(SeedPool):
    """Counts a direction with the wrong sign."""

    def encode(self, update, scratch, memory, local):
        update, memory = super().encode(update, scratch, memory, local)
        delta = update.parts["delta"]
        return update.having("delta", replace(delta, tree=tree.scale(delta.tree, -1.0))), memory


class ProxSign(Prox):
    """Pushes away from the anchor."""

    def grads(self, grads, params, scratch):
        return {name: grad - self.mu * (params[name] - scratch[name]) for name, grad in grads.items()}


class ProxHalf(Prox):
    """Pulls at mu = 0 too."""

    def grads(self, grads, params, scratch):
        return {name: grad + (self.mu + 0.01) * (params[name] - scratch[name]) for name, grad in grads.items()}


class ScaffoldSign(Scaffold):
    def grads(self, grads, params, scratch):
        return {name: grad - scratch[name] for name, grad in grads.items()}


class ScaffoldSteps(Scaffold):
    """Forgets to divide by the sum of the learning rates."""

    def encode(self, update, scratch, memory, local):
        return super().encode(update, scratch, memory, replace(local, facts={**local.facts, "lr_sum": 1.0}))


class ScaffoldPopulation(Scaffold):
    """Divides by the cohort of one instead of the population."""

    def decode(self, total, params, state, ctx):
        return super().decode(total, params, state, replace(ctx, population=1))


class ScaffoldLeaves(Scaffold):
    """Leaves its part in the total."""

    def decode(self, total, params, state, ctx):
        return total, super().decode(total, params, state, ctx)[1]


class DynSign(Dyn):
    def grads(self, grads, params, scratch):
        return {name: grad + scratch[f"h/{name}"] for name, grad in grads.items()}


class DynMean(Dyn):
    """Moves h by the mean instead of the sum over the population."""

    def decode(self, total, params, state, ctx):
        return super().decode(total, params, state, replace(ctx, population=1))


class DynEvaluates(Dyn):
    """Moves its memory in an evaluation."""

    def encode(self, update, scratch, memory, local):
        if "delta" not in update.parts:
            return update, tree.select_prefix(scratch, "anchor")
        return super().encode(update, scratch, memory, local)


class MomentumHeavy(Momentum):
    """Forgets the factor 1 - beta."""

    def _step(self, delta, state):
        velocity = tree.add(delta, {name: state[name] for name in delta if name in state}, self.beta)
        return tree.scale(velocity, self.server_lr), velocity


class MomentumHidden(Momentum):
    """Keeps its state in the process, where no checkpoint finds it."""

    hidden: ClassVar[dict[str, Any]] = {}

    def decode(self, total, params, state, ctx):
        total, after = super().decode(total, params, dict(self.hidden), ctx)
        self.hidden.update(after)
        return total, {}


class AdagradForgets(Adagrad):
    """Starts v anew in each round."""

    def decode(self, total, params, state, ctx):
        kept = {name: leaf for name, leaf in state.items() if name.startswith("m/")}
        return super().decode(total, params, kept, ctx)


class AdamCorrected(Adam):
    """Corrects the bias of m, as local Adam does and the paper does not."""

    def decode(self, total, params, state, ctx):
        total, state = super().decode(total, params, state, ctx)
        part = total.parts.get("delta")
        if part is None:
            return total, state
        grown = tree.scale(part.tree, 1 / (1 - self.beta1 ** (ctx.round + 1)))
        return total.having("delta", replace(part, tree=grown)), state


class YogiSign(Yogi):
    def second(self, v, square):
        return v + (1 - self.beta2) * square * torch.sign(v - square)


class NesterovPlain(Nesterov):
    """Heavy-ball momentum: does not look ahead."""

    def _step(self, delta, state):
        buffer = tree.add(delta, {name: state[name] for name in delta if name in state}, self.momentum)
        return tree.scale(buffer, self.server_lr), buffer


class TopKForgets(TopK):
    """Drops the error."""

    def encode(self, update, scratch, memory, local):
        return super().encode(update, scratch, {}, local)[0], memory


class TopKShares(TopK):
    """Remembers the very tensors that it sends."""

    def encode(self, update, scratch, memory, local):
        sent, memory = super().encode(update, scratch, memory, local)
        part = sent.parts.get("delta")
        return sent, memory if part is None else dict(part.tree)


class TopKDemands(TopK):
    """Cannot do without a delta."""

    def encode(self, update, scratch, memory, local):
        return super().encode(update.having("delta", update.parts["delta"]), scratch, memory, local)


class ByExamplesSums(ByExamples):
    """Forgets to divide."""

    def decode(self, total, params, state, ctx):
        return total, state


class ByExamplesUnguarded(ByExamples):
    """Divides by zero when nobody has answered."""

    def decode(self, total, params, state, ctx):
        parts = total.parts.items()
        return Update(
            {name: replace(p, tree=tree.scale(p.tree, 1 / torch.tensor(p.weight))) for name, p in parts}
        ), state


class UniformByExamples(Uniform):
    """Weighs by examples."""

    def encode(self, update, scratch, memory, local):
        return weighted_mean.weigh(update, local.facts["examples"]), memory


class UniformCut(Uniform):
    """Sends the delta as vectors."""

    def encode(self, update, scratch, memory, local):
        sent, memory = super().encode(update, scratch, memory, local)
        return _mapped(sent, lambda name, leaf: leaf.reshape(-1)), memory

    def decode(self, total, params, state, ctx):
        total, state = super().decode(total, params, state, ctx)
        return _mapped(total, lambda name, leaf: leaf.reshape(params[name].shape)), state


def _mapped(update, function):
    part = update.parts.get("delta")
    if part is None:
        return update
    return update.having("delta", replace(part, tree={n: function(n, leaf) for n, leaf in part.tree.items()}))


class LoraPadBare(LoraPad):
    """Leaves its marks in the total."""

    def decode(self, total, params, state, ctx):
        return total, state


class LoraFairBlind(LoraFair):
    """Corrects nothing."""

    def decode(self, total, params, state, ctx):
        return LoraFair(penalty=1e30).decode(total, params, state, ctx)


class LoraStackTwice(LoraStack):
    """Weighs the columns, too."""

    def encode(self, update, scratch, memory, local):
        update, memory = super().encode(update, scratch, memory, local)
        columns = update.parts.get("columns")
        return (update if columns is None else update.having("columns", replace(columns, weight=None))), memory


class LoraStackShaped(LoraStack):
    """Sends the factors a second time, in the delta."""

    def encode(self, update, scratch, memory, local):
        changed, memory = super().encode(update, scratch, memory, local)
        return (changed.having("delta", update.parts["delta"]) if "delta" in update.parts else changed), memory


class LoraPrunePush(LoraPrune):
    """Rewards what it should punish."""

    def grads(self, grads, params, scratch):
        changed = super().grads(grads, params, scratch)
        return {name: 2 * grads[name] - leaf for name, leaf in changed.items()}


class LoraPruneAlike(LoraPrune):
    """All clients weigh the same."""

    def encode(self, update, scratch, memory, local):
        update, memory = super().encode(update, scratch, memory, local)
        return Update({name: replace(part, weight=part.weight and 1.0) for name, part in update.parts.items()}), memory


class LoraCapLeast(LoraCap):
    """Sends what moved least."""

    def _chosen(self, leaves, order, room):
        return super()._chosen(leaves, order[::-1], room)


class LoraProductAnew(LoraProduct):
    """Adds the old product to the mean of the whole ones."""

    def encode(self, update, scratch, memory, local):
        return LoraProduct("product").encode(update, scratch, memory, local)


class LoraSvdBalanced(LoraSvd):
    """Gives both factors the roots of the singular values."""

    def decode(self, total, params, state, ctx):
        part = total.parts.get("delta")
        if part is None or not part.weight:
            return total, state
        step = {}
        for layer in low_rank.layers(params):
            b, a = low_rank.merged_factors(params, part.tree, layer)
            new = low_rank.layer_leaves(layer, *low_rank.truncated(b, a, len(a), layer))
            step |= {name: leaf - params[name] for name, leaf in new.items()}
        return total.having("delta", replace(part, tree=step)), state


class LoraMergeTwice(LoraMerge):
    """Weighs the columns, too: a stack divided once too often."""

    def encode(self, update, scratch, memory, local):
        update, memory = super().encode(update, scratch, memory, local)
        columns = update.parts.get("columns")
        return (update if columns is None else update.having("columns", replace(columns, weight=None))), memory


class LoraMergeGoesOn(LoraMerge):
    """Keeps the factors that it has merged."""

    def decode(self, total, params, state, ctx):
        total, state = super().decode(total, params, state, ctx)
        return _mapped(total, lambda name, leaf: torch.zeros_like(leaf)), state


class LoraResidualTurned(LoraResidual):
    """Adds the residual with its axes of input and output confused."""

    def decode(self, total, params, state, ctx):
        total, state = super().decode(total, params, state, ctx)
        part = total.parts.get("base_delta")
        if part is None:
            return total, state
        pairs = {layer: low_rank.pair(part.tree, layer) for layer in low_rank.layers(part.tree)}
        turned = {}
        for layer, (b, a) in pairs.items():
            size_out, size_in = len(b), a.shape[1]
            product = (b @ a).T.reshape(size_out, size_in)
            turned |= low_rank.layer_leaves(layer, product, torch.eye(size_in, dtype=a.dtype))
        return total.having("base_delta", replace(part, tree=turned)), state


class LoraResidualLost(LoraResidual):
    """Forgets the residual."""

    def decode(self, total, params, state, ctx):
        total, state = super().decode(total, params, state, ctx)
        part = total.parts.get("base_delta")
        nothing = None if part is None else replace(part, tree=tree.zeros_like(part.tree))
        return (total if nothing is None else total.having("base_delta", nothing)), state


class SparseFirstForgets(SparseFirst):
    """Drops what the factors cannot hold, in silence."""

    def decode(self, total, params, state, ctx):
        total, state = super().decode(total, params, state, ctx)
        part = total.parts.get("base_delta")
        nothing = None if part is None else replace(part, tree=tree.zeros_like(part.tree))
        return (total if nothing is None else total.having("base_delta", nothing)), state


class SparseFirstTwice(SparseFirst):
    """Leaves the sparse values where their weight has moved already."""

    def decode(self, total, params, state, ctx):
        kept = {name: leaf for name, leaf in total.parts["delta"].tree.items()} if "delta" in total.parts else {}
        total, state = super().decode(total, params, state, ctx)
        return _mapped(total, lambda name, leaf: kept.get(name, leaf)), state


class QuantizeUnscaled(Quantize):
    """Sends codes, not values."""

    def _rounded(self, part_name, part, ctx):
        found = super()._rounded(part_name, part, ctx)
        ones = {name: torch.ones_like(scale) for name, scale in found.wire_format.scales.items()}
        codes = {n: torch.sign(leaf) for n, leaf in found.tree.items()}
        return replace(found, tree=codes, wire_format=replace(found.wire_format, scales=ones))


class QuantizeDown(Quantize):
    """Rounds towards minus infinity, which has a bias."""

    def _codes(self, rows, generator):
        _, scales = super()._codes(rows, generator)
        return (rows / torch.where(scales == 0, torch.ones_like(scales), scales)[:, None]).floor().clamp(-7, 7), scales


class QuantizeOffGrid(Quantize):
    """Names a packing that its values do not fit."""

    def encode(self, update, scratch, memory, local):
        return update.having("delta", self._named(update.parts["delta"])) if "delta" in update.parts else update, memory

    def _named(self, part):
        return Part(part.tree, part.weight, WireFormat(bits=4, scales={n: torch.ones(1).double() for n in part.tree}))


class ClipsParts(GaussianDp):
    """Bounds each tensor by itself, so that the whole is longer."""

    def _bounded(self, update, clip, local):
        sent, groups = super()._bounded(update, clip, local)
        part = update.parts["delta"]
        own = {name: leaf * min(1.0, clip / float(leaf.norm())) for name, leaf in part.tree.items()}
        return sent.having("delta", replace(part, tree=own)), groups


class ClipStays(GaussianDp):
    """Never moves its clip."""

    def _moved(self, clip, above_half, ctx):
        return self._clip_of({})


class FtrlUnclipped(DpFtrl):
    """Bounds nothing."""

    def encode(self, update, scratch, memory, local):
        return update, memory


class LocalScores(LocalGaussian):
    """Bounds scores, too."""

    def encode(self, update, scratch, memory, local):
        part = update.parts["delta"]
        return super().encode(update.having("delta", part), scratch, memory, local)


class SmallestFirst(SelectiveEncryption):
    """Picks the entries that move least."""

    def _map(self, sizes):
        return super()._map({name: -leaf for name, leaf in sizes.items()})


class DiscreteUnclipped(DiscreteNoise):
    """Bounds nothing."""

    def encode(self, update, scratch, memory, local):
        return update, memory


class LocalUnclipped(LocalGaussian):
    """Bounds nothing."""

    def encode(self, update, scratch, memory, local):
        return update, memory


class FixedDown(FixedPoint):
    """Always rounds down."""

    def encode(self, update, scratch, memory, local):
        sent, memory = super().encode(update, scratch, memory, local)
        scale = self.levels(local.ctx.cohort) / self.bound
        down = {
            key: torch.floor(update.parts["delta"].tree[key.split("/", 2)[2]] * scale).to(leaf.dtype)
            for key, leaf in sent.parts["values"].tree.items()
        }
        return sent.having("values", replace(sent.parts["values"], tree=down)), memory


@dataclass(frozen=True)
class Unhashable(Stage):
    """Holds a list."""

    settings: Mapping[str, Any] = field(default_factory=dict)


TWINS = (
    Twin("keep", KeepsNothing(("*lora_B",)), "equals_its_paper"),
    Twin("keep", KeepsEverything(("*lora_B",)), "equals_its_paper"),
    Twin("ditto", DittoSign(lam=2.0), "equals_its_paper"),
    Twin("personal_last", NeverLast(), "equals_its_paper"),
    Twin("rest_of_world", WholeWorld(), "equals_its_paper"),
    Twin("fdlora", FdloraForgets(every=1, fuse=False), "equals_its_paper"),
    Twin("seed_pool", SeedSign(), "equals_its_paper"),
    Twin("prox", ProxSign(mu=2.0), "equals_its_paper"),
    Twin("prox", ProxHalf(mu=2.0), "neutral_is_fedavg", neutral=ProxHalf(mu=0)),
    Twin("prox", Prox(mu=0), "settings_matter"),
    Twin("scaffold", ScaffoldSign(), "equals_its_paper"),
    Twin("scaffold", ScaffoldSteps(), "equals_its_paper"),
    Twin("scaffold", ScaffoldPopulation(), "equals_its_paper"),
    Twin("scaffold", ScaffoldLeaves(), "takes_out_what_it_makes"),
    Twin("dyn", DynSign(alpha=0.5), "equals_its_paper"),
    Twin("dyn", DynMean(alpha=0.5), "equals_its_paper"),
    Twin("dyn", DynEvaluates(alpha=0.5), "evaluation_passes"),
    Twin("momentum", MomentumHeavy(beta=0.5, server_lr=2.0), "equals_its_paper"),
    Twin("momentum", MomentumHidden(beta=0.5, server_lr=2.0), "resumes_to_the_bit"),
    Twin("momentum", Unhashable(), "is_a_value", error=TypeError),
    Twin("adagrad", AdagradForgets(beta1=0.5, tau=0.01, server_lr=0.05), "equals_its_paper"),
    Twin("adagrad", Adagrad(0.5, 0.01, 0.05), "neutral_is_fedavg", neutral=Adagrad(0.0, HUGE, HUGE)),
    Twin("adam", AdamCorrected(beta1=0.5, beta2=0.9, tau=0.01, server_lr=0.05), "equals_its_paper"),
    Twin("yogi", YogiSign(beta1=0.5, beta2=0.9, tau=0.01, server_lr=0.05), "equals_its_paper"),
    Twin("nesterov", NesterovPlain(server_lr=0.7, momentum=0.9), "equals_its_paper"),
    Twin("top_k", TopKForgets(fraction=0.1), "equals_its_paper"),
    Twin("top_k", TopKShares(fraction=0.1), "shares_no_storage"),
    Twin("top_k", TopKDemands(fraction=0.1), "evaluation_passes", error=KeyError),
    Twin("by_examples", ByExamplesSums(), "neutral_is_fedavg", neutral=ByExamplesSums()),
    Twin("by_examples", ByExamplesUnguarded(), "empty_rounds_are_harmless", error=RunError),  # NaN for every client
    Twin("uniform", UniformByExamples(), "equals_its_paper"),
    Twin("uniform", UniformCut(), "declares_its_shape"),
    Twin("lora_pad", LoraPadBare(), "takes_out_what_it_makes"),
    Twin("lora_fair", LoraFairBlind(), "equals_its_paper"),
    Twin("lora_stack", LoraStackTwice(), "equals_its_paper"),
    Twin("lora_stack", LoraStackShaped(), "declares_its_shape"),
    Twin("lora_prune", LoraPrunePush(gamma=0.5, penalty=1.0), "equals_its_paper"),
    Twin("lora_prune", LoraPruneAlike(gamma=0.5, penalty=1.0), "equals_its_paper"),
    Twin("lora_cap", LoraCapLeast(bits=(32,)), "equals_its_paper"),
    Twin("lora_product", LoraProductAnew(), "equals_its_paper"),
    Twin("lora_merge", LoraMergeTwice(), "equals_its_paper"),
    Twin("lora_merge", LoraMergeGoesOn(), "equals_its_paper"),
    Twin("lora_residual", LoraResidualTurned(), "equals_its_paper"),
    Twin("lora_residual", LoraResidualLost(), "equals_its_paper"),
    Twin("sparse_first", SparseFirstForgets(rounds=1), "equals_its_paper"),
    Twin("sparse_first", SparseFirstTwice(rounds=1), "equals_its_paper"),
    Twin("lora_svd", LoraSvdBalanced(), "equals_its_paper"),
    Twin("gaussian_dp", ClipsParts(0.02, 0.0, adaptive=AdaptiveClip(1.0, 0.8)), "equals_its_paper"),
    Twin("gaussian_dp", ClipStays(0.02, 0.0, adaptive=AdaptiveClip(1.0, 0.8)), "equals_its_paper"),
    Twin("dp_ftrl", FtrlUnclipped(0.02, 0.0), "equals_its_paper"),
    Twin("local_gaussian", LocalUnclipped(0.02, 0.0), "equals_its_paper"),
    Twin("local_gaussian", LocalScores(0.02, 0.0), "evaluation_passes", error=KeyError),
    Twin("discrete_noise", DiscreteUnclipped(0.02, 0.0), "equals_its_paper"),
    Twin("selective_encryption", SmallestFirst(0.3, "drop"), "equals_its_paper"),
    Twin("fixed_point", FixedDown(16, 0.5, 600.0), "rounds_without_bias"),
    Twin("quantize", QuantizeUnscaled(bits=4), "equals_its_paper"),
    Twin("quantize", QuantizeDown(bits=4), "rounds_without_bias"),
    Twin("quantize", QuantizeOffGrid(bits=4), "survives_the_wire"),
)
