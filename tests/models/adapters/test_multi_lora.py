"""Several LoRAs on the same layers: one alone is LoRA, constant weights make one, routers and references do not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedllm.errors import ConfigError
from fedllm.models.adapters.lora import Lora
from fedllm.models.adapters.multi_lora import REFERENCE, AttachedMultiLora, MultiLora
from fedllm.models.batch import Batch, collate
from fedllm.models.layers.forward_context import Forward, forward_context
from fedllm.models.loaded_model import LoadedModel, load
from fedllm.models.task import Task
from fedllm.tensors import tree
from fedllm.tensors.tree import Tree
from tests.models.adapters.test_lora import KEY, apart, example, gradients, peft_of, stacked, task, trained
from tests.wide import EXACT

TARGETS = ("q_proj", "v_proj", "down_proj")  # v_proj and down_proj are not square
TWO = MultiLora(rank=3, alpha=6, targets=TARGETS)


def loaded(adapter: Any, dtype: str = "float64") -> LoadedModel:
    return load(Task("tiny-llama", adapter=adapter, dtype=dtype))  # type: ignore[arg-type]


def branch(params: Tree, name: str) -> Tree:
    """The tensors of one branch alone."""
    return {leaf: value for leaf, value in params.items() if f".{name}.lora_" in leaf}


def as_lora(params: Tree, name: str) -> Tree:
    return {leaf.replace(f".{name}.", "."): value for leaf, value in branch(params, name).items()}


@pytest.mark.parametrize("mixer", ["constant", "router", "similarity"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_branch_alone_is_lora_to_the_bit(mixer: str, dtype: str) -> None:
    adapter = MultiLora(rank=3, alpha=6, targets=TARGETS, mixer=mixer, weights=(0.3, 0.9))  # type: ignore[arg-type]
    model = loaded(adapter, dtype)
    whole = trained(model)
    batch = collate([[example(9), example(5, 1)], [example(7, 2)]])
    mine = [branch(whole, "personal"), tree.scale(branch(whole, "personal"), 0.5)]
    found = gradients(model, mine, batch)
    loss = model.losses(stacked(mine), batch)
    lora = load(task(Lora(3, 6, TARGETS), dtype))
    theirs = [{name.replace(".personal.", "."): leaf for name, leaf in each.items()} for each in mine]
    expected = gradients(lora, theirs, batch)
    assert torch.equal(loss, lora.losses(stacked(theirs), batch))
    for name, leaf in expected.items():
        layer, _, side = name.rpartition(".")
        assert torch.equal(found[f"{layer}.personal.{side}"], leaf), name


def test_it_begins_as_lora_does() -> None:
    start, lora = loaded(TWO).initial_params(KEY), load(task(Lora(3, 6, TARGETS), "float64")).initial_params(KEY)
    for name in ("shared", "personal"):
        assert tree.equal(as_lora(start, name), lora)
    other = loaded(MultiLora(rank=3, alpha=6, targets=TARGETS, distinct=True)).initial_params(KEY)
    assert not torch.equal(*(next(iter(branch(other, name).values())) for name in ("shared", "personal")))


def summed(inputs: Tensor, layer: str, params: Tree, weights: Tensor, scale: float) -> Tensor:
    """sum_b w_b(t) s B_b A_b x_t by the formula; weights (T, 2)."""
    pairs = [[params[f"{layer}.{name}.lora_{side}"] for side in "AB"] for name in ("shared", "personal")]
    return sum(
        (weights[:, at, None] * scale * (inputs @ a.T @ b.T) for at, (a, b) in enumerate(pairs)), torch.zeros(())
    )


@pytest.mark.parametrize("mixer", ["constant", "router"])
def test_a_layer_is_the_formula(mixer: str) -> None:
    """With inputs of the layer itself, forward and gradients; two clients of unequal numbers of tokens."""
    adapter = MultiLora(rank=3, alpha=6, targets=TARGETS, mixer=mixer, weights=(0.3, 0.9))  # type: ignore[arg-type]
    model = loaded(adapter)
    name = "model.layers.0.mlp.down_proj"
    each = [trained(model, seed) for seed in (1, 2)]
    stack = stacked(each)
    attached = model.adapter
    assert isinstance(attached, AttachedMultiLora)
    layer, joined = attached.layers[name], attached._joined(stack)
    x = torch.randn(7, layer.in_features, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with forward_context(Forward(joined, (4, 3), (4, 3))):
        y = layer(x[None])[0]
    toward = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (y * toward).sum().backward()
    found = {leaf: value.grad for leaf, value in stack.items() if value.grad is not None}
    wanted, rows = [], x.split([4, 3])
    leaves = [{leaf: value.clone().requires_grad_() for leaf, value in own.items()} for own in each]
    for own, mine in zip(leaves, rows, strict=True):
        constant = torch.tensor([[0.3, 0.9]], dtype=torch.float64).expand(len(mine), 2)
        gates = constant if mixer == "constant" else torch.softmax(mine @ own[f"{name}.router"].T, 1)
        assert torch.allclose(gates.sum(1), torch.ones(len(mine), dtype=torch.float64)) or mixer == "constant"
        wanted.append(torch.nn.functional.linear(mine, layer.weight) + summed(mine, name, own, gates, 2.0))
    assert apart(y, torch.cat(wanted)) < EXACT
    (torch.cat(wanted) * toward).sum().backward()
    for leaf, grad in found.items():
        expected = torch.stack([own[leaf].grad for own in leaves])  # type: ignore[misc]
        assert apart(grad, expected) < EXACT, leaf


def test_constant_weights_are_one_lora_that_peft_loads(tmp_path: Path) -> None:
    model = loaded(MultiLora(rank=3, alpha=6, targets=TARGETS, weights=(0.3, 0.9)), "float32")
    params = trained(model)
    tokens = torch.arange(11)[None] % 250
    found, _ = model.adapter.logits(params, tokens, torch.ones_like(tokens), None)
    model.adapter.save(params, tmp_path, "tiny-llama")
    from peft import PeftModel

    from fedllm.models.base_models.load import load_base

    saved = PeftModel.from_pretrained(load_base("tiny-llama", dtype="float32").model, tmp_path)
    assert apart(saved(tokens).logits[:, -1], found) < 1e-5
    weights = model.adapter.merged(params)
    name = "model.layers.1.self_attn.v_proj"
    mixed = sum(w * 2.0 * params[f"{name}.{b}.lora_B"] @ params[f"{name}.{b}.lora_A"]
                for b, w in (("shared", 0.3), ("personal", 0.9)))  # fmt: skip
    base = model.base.model.get_submodule(name).weight
    assert apart(weights[f"{name}.weight"], base + mixed) < 1e-6


@pytest.mark.parametrize("mixer", ["router", "similarity"])
def test_what_depends_on_inputs_is_saved_branch_by_branch(mixer: str, tmp_path: Path) -> None:
    adapter = MultiLora(rank=3, alpha=6, targets=TARGETS, mixer=mixer)  # type: ignore[arg-type]
    model = loaded(adapter, "float32")
    params = trained(model)
    model.adapter.save(params, tmp_path, "tiny-llama")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["fedllm"], config["mixer"]) == ("multi_lora", mixer)
    from peft import PeftModel

    from fedllm.models.base_models.load import load_base

    saved = PeftModel.from_pretrained(load_base("tiny-llama", dtype="float32").model, tmp_path / "personal")
    tokens = torch.arange(9)[None]
    alone, _ = model.adapter.logits(branch(params, "personal"), tokens, torch.ones_like(tokens), None)
    assert apart(saved(tokens).logits[:, -1], alone) < 1e-5
    with pytest.raises(ConfigError, match="which no merged weight can hold"):
        model.adapter.merged(params)


SIMILAR = MultiLora(rank=3, alpha=6, targets=TARGETS, mixer="similarity", cap=0.5)


def weights(attached: AttachedMultiLora, params: Tree, batch: Batch) -> Tensor:
    """(S, 2), of the sequences of a batch of one client."""
    similarity = attached._similarity
    states = similarity.states(attached._last({n: leaf[None] for n, leaf in params.items()}), batch)
    return similarity.weights(states, params[REFERENCE].expand(len(states), -1))


def test_without_references_the_first_branch_counts_in_full() -> None:
    model = loaded(SIMILAR)
    params = {**trained(model), REFERENCE: torch.zeros(64, dtype=torch.float64)}
    batch = collate([[example(9), example(5, 1)]])
    one, other = (
        model.losses({n: leaf[None] for n, leaf in each.items()}, batch) for each in (params, branch(params, "shared"))
    )
    assert apart(one, other) < EXACT


def test_each_sequence_has_the_weight_of_its_likeness() -> None:
    """By hand: the state before the first label under the personal branch alone, its cosine with two references."""
    model = loaded(SIMILAR)
    attached, params = model.adapter, trained(model)
    assert isinstance(attached, AttachedMultiLora)
    known = collate([[example(6, 3), example(8, 4)]])
    reference = attached.reference(params, known)
    params = {**params, REFERENCE: reference}
    personal = {n: leaf[None] for n, leaf in as_lora(params, "personal").items()}
    lora = load(task(Lora(3, 6, TARGETS), "float64"))

    def states(*some: Any) -> Tensor:
        batch = collate([some])
        hidden = lora.adapter.hidden(personal, batch)
        firsts = [int(batch.rows[batch.row_sequences == at][0]) for at in range(len(some))]
        return torch.nn.functional.normalize(hidden[firsts], dim=1)

    late = example(9, 5)
    late.targets[:4] = -100  # a prompt of four tokens
    asked = collate([[late, example(5, 6)]])
    cosines = (states(late, example(5, 6)) @ states(example(6, 3), example(8, 4)).T).mean(1)
    found = weights(attached, params, asked)
    assert apart(found[:, 1], 0.5 * cosines) < 1e-6
    assert torch.allclose(found.sum(1), torch.ones(2))
    whole = model.losses({n: leaf[None] for n, leaf in params.items()}, asked)
    apiece = []
    for at, weight in enumerate(found[:, 1].tolist()):
        fixed = loaded(MultiLora(rank=3, alpha=6, targets=TARGETS, weights=(1 - weight, weight)))
        stack = {n: leaf[None] for n, leaf in params.items() if n != REFERENCE}
        apiece.append(fixed.losses(stack, collate([[[late, example(5, 6)][at]]])))
    assert apart(whole[0], torch.stack(apiece).mean()) < 1e-6


def test_own_inputs_are_nearer_than_those_of_others() -> None:
    """Inputs of few words: the references themselves have the largest mean cosine there is."""
    model = loaded(SIMILAR)
    attached, params = model.adapter, trained(model)
    assert isinstance(attached, AttachedMultiLora)
    own = attached.reference(params, collate([[example(6, 3)]]))
    near, far = weights(attached, {**params, REFERENCE: own}, collate([[example(6, 3), example(6, 9)]]))[:, 1]
    assert float(near) == pytest.approx(0.5, abs=1e-6) and float(far) < float(near) - 1e-3


def test_generation_weighs_prompts_as_scoring_does() -> None:
    """Alone or padded, with weights that are kept beside the cache."""
    model = loaded(SIMILAR, "float32")
    attached, params = model.adapter, trained(model)
    assert isinstance(attached, AttachedMultiLora)
    params[REFERENCE] = attached.reference(params, collate([[example(6, 3)]]))
    prompts = [[5, 6, 7, 8], [9, 10]]
    together = model.generate(params, prompts, 4)
    assert together == [model.generate(params, [prompt], 4)[0] for prompt in prompts]


def test_a_stack_is_its_clients_one_by_one() -> None:
    for mixer in ("constant", "router", "similarity"):
        model = loaded(MultiLora(rank=3, alpha=6, targets=TARGETS, mixer=mixer))  # type: ignore[arg-type]
        each, records = [trained(model, seed) for seed in range(3)], [[example(9)], [example(5, 1), example(6, 2)], []]
        together = gradients(model, each, collate(records))
        for k in (0, 1):
            alone = gradients(model, [each[k]], collate([records[k]]))
            assert all(apart(together[name][k], alone[name][0]) < EXACT for name in alone if name != REFERENCE), mixer


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"branches": ("a", "a")}, "give different names"),
        ({"branches": ()}, "give different names"),
        ({"weights": (1.0,)}, "one finite number for each of shared, personal"),
        ({"mixer": "similarity", "branches": ("a", "b", "c")}, "weighs two branches"),
        ({"mixer": "gate"}, "one of constant, router, similarity, fused"),
        ({"cap": 2.0}, "from 0 to 1"),
        ({"rank": 0}, "task.adapter.multi_lora.rank is 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        MultiLora(**settings)


def test_two_branches_are_pefts_lora_of_the_summed_rank() -> None:
    model = loaded(TWO, "float32")
    params = trained(model)
    single = model.adapter._single(params)  # type: ignore[attr-defined]
    tokens = torch.arange(7)[None]
    found, _ = model.adapter.logits(params, tokens, torch.ones_like(tokens), None)
    peft = peft_of(Lora(6, 12, TARGETS), single)
    assert apart(peft(tokens).logits[:, -1], found) < 1e-5
