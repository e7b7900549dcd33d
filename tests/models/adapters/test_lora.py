"""LoRA: forward and gradients of PEFT's own layers, its layout on disk, keyed draws, stacks, and refusals."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from threading import Barrier, Thread
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedllm.errors import CheckError, ConfigError
from fedllm.models.adapters.lora import Lora
from fedllm.models.base_models.load import load_base
from fedllm.models.batch import Batch, Example, collate
from fedllm.models.loaded_model import LoadedModel, load
from fedllm.models.task import Scope, Task
from fedllm.rng import Key
from fedllm.tensors import tree
from fedllm.tensors.tree import Tree
from tests.wide import EXACT, SINGLE

KEY = Key(7)
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SETTINGS = [
    Lora(rank=1, alpha=1.0),
    Lora(rank=8, alpha=16.0),
    Lora(rank=3, alpha=5.0, targets=("q_proj", "v_proj")),
    Lora(rank=32, alpha=8.0, rslora=True, targets=("*.mlp.*",)),
]


def task(lora: Lora, dtype: str = "float32", **more: Any) -> Task:
    return Task("tiny-llama", adapter=lora, dtype=dtype, **more)  # type: ignore[arg-type]


def trained(model: LoadedModel, seed: int = 0) -> Tree:
    """Weights as after some steps: B is not zero."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: leaf + 0.1 * torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf.dtype)
        for name, leaf in model.initial_params(KEY).items()
    }


def example(length: int, seed: int = 0) -> Example:
    tokens = torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed))
    targets = tokens.roll(-1)
    targets[-1] = -100
    return Example(tokens, targets)


def stacked(trees: Sequence[Tree]) -> Tree:
    return {name: leaf.requires_grad_() for name, leaf in tree.stack(trees).items()}


def gradients(model: LoadedModel, trees: Sequence[Tree], batch: Batch) -> Tree:
    stack = stacked(trees)
    model.losses(stack, batch).sum().backward()
    return {name: leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for name, leaf in stack.items()}


def peft_of(lora: Lora, params: Tree, dtype: str = "float32") -> Any:
    """PEFT's model of the same settings, with the same weights."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        use_rslora=lora.rslora,
        target_modules=sorted(name.removesuffix(".lora_A") for name in params if name.endswith("lora_A")),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(load_base("tiny-llama", dtype=dtype).model, config)
    found = dict(model.named_parameters())
    with torch.no_grad():
        for name, leaf in params.items():
            found[f"base_model.model.{name}.default.weight"].copy_(leaf)
    return model.eval()


def apart(found: Tensor, expected: Tensor) -> float:
    """The 2-norm of the difference over that of what is expected."""
    return float((found - expected).detach().norm() / expected.detach().norm())


@pytest.mark.parametrize("lora", SETTINGS, ids=lambda lora: f"rank{lora.rank}")
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", SINGLE), ("float64", EXACT)])
def test_logits_losses_and_gradients_are_those_of_peft(lora: Lora, dtype: str, tolerance: float) -> None:
    model = load(task(lora, dtype))
    params, examples = trained(model), [example(5), example(9, seed=1)]
    batch, other = collate([examples]), peft_of(lora, params, dtype)
    logits = [other(input_ids=item.tokens[None]).logits[0] for item in examples]
    with torch.no_grad():
        found = model.adapter.hidden(tree.stack([params]), batch) @ model.adapter.head({}).T
    assert apart(found, torch.cat([row[:-1] for row in logits])) < tolerance  # a last token is no input
    losses = [cross_entropy(row, item.targets, ignore_index=-100) for row, item in zip(logits, examples, strict=True)]
    total = torch.stack(losses).mean()
    assert float(model.losses(tree.stack([params]), batch)) == pytest.approx(float(total.detach()), rel=tolerance)
    total.backward()
    expected = {
        name.removeprefix("base_model.model.").removesuffix(".default.weight"): leaf.grad[None]
        for name, leaf in other.named_parameters()
        if leaf.requires_grad
    }
    grads = gradients(model, [params], batch)
    assert grads.keys() == expected.keys()
    assert tree.norm(tree.sub(grads, expected)) < tolerance * tree.norm(expected)


def test_an_adapter_whose_b_is_zero_changes_no_bit_and_one_that_is_trained_does() -> None:
    model = load(task(Lora(rank=4)))
    examples = [example(8)]
    (base,), (start,) = model.sequence_nll({}, examples), model.sequence_nll(model.initial_params(KEY), examples)
    assert torch.equal(base, start)
    (after,) = model.sequence_nll(trained(model), examples)
    assert float((after - base).abs().max()) > 1e-2


# initial values


def test_a_fresh_adapter_is_pefts_distribution_from_its_key_alone() -> None:
    model = load(task(Lora(rank=8)))
    state = torch.get_rng_state()
    one, again, other = model.initial_params(KEY), model.initial_params(KEY), model.initial_params(Key(8))
    assert torch.equal(torch.get_rng_state(), state)
    assert tree.equal(one, again) and not tree.equal(one, other)
    for name, leaf in one.items():
        if name.endswith("lora_B"):
            assert not leaf.any()
            continue
        bound = 1 / math.sqrt(leaf.shape[1])  # kaiming_uniform(a = sqrt(5)): variance 1 / (3 in)
        assert float(leaf.abs().max()) <= bound
        assert float(leaf.var()) == pytest.approx(bound**2 / 3, rel=0.2)
    assert not torch.equal(one["model.layers.0.mlp.up_proj.lora_A"], one["model.layers.0.mlp.gate_proj.lora_A"])


def test_leaves_are_named_by_their_layers_and_the_head_is_left_out() -> None:
    params = load(task(Lora(rank=2))).initial_params(KEY)
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in params} == set(ALL_LINEAR)
    assert len(params) == 2 * 2 * len(ALL_LINEAR) and not any("lm_head" in name for name in params)
    shapes = {name: tuple(leaf.shape) for name, leaf in params.items() if "layers.1.mlp.down_proj" in name}
    assert shapes == {"model.layers.1.mlp.down_proj.lora_A": (2, 192), "model.layers.1.mlp.down_proj.lora_B": (64, 2)}


@pytest.mark.parametrize(
    ("targets", "layers"),
    [
        (("q_proj",), {"model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"}),
        (("*.layers.1.self_attn.[qk]_proj",), {f"model.layers.1.self_attn.{x}_proj" for x in "qk"}),
        (("*.0.*down_proj", "*.1.*.up_proj"), {"model.layers.0.mlp.down_proj", "model.layers.1.mlp.up_proj"}),
    ],
)
def test_targets_choose_layers(targets: tuple[str, ...], layers: set[str]) -> None:
    params = load(task(Lora(rank=2, targets=targets))).initial_params(KEY)
    assert {name.rpartition(".lora_")[0] for name in params} == layers


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_leaves_are_float32_or_wider(dtype: str) -> None:
    model = load(task(Lora(rank=2), dtype=dtype))
    leaves = model.initial_params(KEY).values()
    assert {leaf.dtype for leaf in leaves} == {torch.float64 if dtype == "float64" else torch.float32}
    grads = gradients(model, [trained(model)], collate([[example(6)]]))
    assert tree.finite(grads) and {leaf.dtype for leaf in grads.values()} == {leaf.dtype for leaf in leaves}


# on disk


@pytest.mark.parametrize("lora", SETTINGS, ids=lambda lora: f"rank{lora.rank}")
def test_peft_loads_what_is_saved(lora: Lora, tmp_path: Path) -> None:
    from peft import PeftModel

    model = load(task(lora))
    params, tokens = trained(model), example(10).tokens[None]
    model.adapter.save(params, tmp_path / "new" / "adapter", "tiny-llama")
    other = PeftModel.from_pretrained(load_base("tiny-llama", dtype="float32").model, tmp_path / "new" / "adapter")
    with torch.no_grad():
        found, _ = model.adapter.logits(params, tokens, torch.ones_like(tokens), None)
        assert apart(other(tokens).logits[:, -1], found) < SINGLE
        base = load_base("tiny-llama", dtype="float32").model(tokens).logits[:, -1]
    assert float((found - base).abs().max()) > 1e-2
    config = json.loads((tmp_path / "new" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny-llama" and config["peft_type"] == "LORA"


@pytest.mark.parametrize("rslora", [False, True])
def test_a_layer_of_another_rank_keeps_the_scale_of_the_task(rslora: bool, tmp_path: Path) -> None:
    """Rank 3 of a rank-8 adapter: the same function as rank 8 with five zero rows."""
    from peft import PeftModel

    model = load(task(Lora(rank=8, alpha=4.0, targets=("q_proj",), rslora=rslora)))
    params = trained(model)
    layer = "model.layers.1.self_attn.q_proj"
    a, b = f"{layer}.lora_A", f"{layer}.lora_B"
    sliced = {**params, a: params[a][:3], b: params[b][:, :3]}
    whole = {name: leaf.clone() for name, leaf in params.items()}
    whole[b][:, 3:] = 0
    model.adapter.save(sliced, tmp_path, "tiny-llama")
    tokens = example(7).tokens[None]
    other = PeftModel.from_pretrained(load_base("tiny-llama", dtype="float32").model, tmp_path)
    with torch.no_grad():
        found, _ = model.adapter.logits(whole, tokens, torch.ones_like(tokens), None)
        assert apart(other(tokens).logits[:, -1], found) < SINGLE


@pytest.mark.parametrize("lora", SETTINGS, ids=lambda lora: f"rank{lora.rank}")
def test_merged_weights_give_the_same_logits(lora: Lora) -> None:
    model = load(task(lora))
    params, tokens = trained(model), example(10).tokens[None]
    plain = load_base("tiny-llama", dtype="float32").model
    merged = model.adapter.merged(params)
    assert {name.removesuffix(".weight") for name in merged} == {name.rpartition(".lora_")[0] for name in params}
    found = dict(plain.named_parameters())
    with torch.no_grad():
        expected, _ = model.adapter.logits(params, tokens, torch.ones_like(tokens), None)
        for name, leaf in merged.items():
            found[name].copy_(leaf)
        assert apart(plain(tokens).logits[:, -1], expected) < SINGLE


def test_init_from_starts_where_a_saved_adapter_ended(tmp_path: Path) -> None:
    lora = Lora(rank=4, targets=("q_proj",))
    params = trained(load(task(lora)))
    load(task(lora)).adapter.save(params, tmp_path / "run" / "adapter", "tiny-llama")
    for folder in (tmp_path / "run", tmp_path / "run" / "adapter"):  # a run, or the adapter itself
        again = Lora(rank=4, targets=("q_proj",), init_from=str(folder))
        assert tree.equal(load(task(again)).initial_params(KEY), params)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rank": 8}, r"is \(4, 64\) in .*, the task needs \(8, 64\)"),
        ({"targets": ("q_proj", "k_proj")}, "has no model.layers.0.self_attn.k_proj.lora_A"),
        ({"targets": ("*.0.*.q_proj",)}, "which the task does not train"),
        ({"alpha": 32.0}, "was trained with the scale 4, the task has 8"),
    ],
)
def test_init_from_refuses_an_adapter_that_does_not_fit(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    saved = {"rank": 4, "alpha": 16.0, "targets": ("q_proj",)}
    model = load(task(Lora(**saved)))
    model.adapter.save(model.initial_params(KEY), tmp_path, "tiny-llama")
    with pytest.raises(ConfigError, match=reason):
        load(task(Lora(**{**saved, **changes}, init_from=str(tmp_path)))).initial_params(KEY)


def test_init_from_refuses_a_folder_without_an_adapter(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no adapter_model\.safetensors"):
        load(task(Lora(init_from=str(tmp_path)))).initial_params(KEY)
    model = load(task(Lora(rank=8)))
    model.adapter.save(model.initial_params(KEY), tmp_path, "tiny-llama")
    for text in ("{", "{}"):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(ConfigError, match="no configuration of a LoRA adapter"):
            load(task(Lora(rank=8, init_from=str(tmp_path)))).initial_params(KEY)


# stacks of clients


def test_two_clients_in_a_stack_are_two_stacks_of_one() -> None:
    model = load(task(Lora(rank=4), dtype="float64"))
    trees = [trained(model, seed) for seed in range(2)]
    clients = [[example(5), example(9, seed=1)], [example(7, seed=2)]]
    both = gradients(model, trees, collate(clients))
    for k in range(2):
        alone = gradients(model, [trees[k]], collate([clients[k]]))
        for name, grad in alone.items():
            assert float((both[name][k] - grad[0]).norm()) <= 1e-9 * tree.norm(alone)
    assert not tree.equal(tree.unstack(both, 0), tree.unstack(both, 1))


def test_an_idle_client_gets_no_gradient_and_a_loss_of_zero() -> None:
    model = load(task(Lora(rank=4), dtype="float64"))
    trees = [trained(model, seed) for seed in range(3)]
    batch = collate([[example(5)], [], [example(6, seed=1)]])
    losses = model.losses(tree.stack(trees), batch)
    assert losses[1] == 0 and bool((losses[[0, 2]] > 0).all())
    grads = gradients(model, trees, batch)
    assert not any(leaf[1].any() for leaf in grads.values())
    assert all(bool(leaf[0].any()) and bool(leaf[2].any()) for leaf in grads.values())


def generators(*seeds: int) -> tuple[torch.Generator, ...]:
    return tuple(torch.Generator().manual_seed(seed) for seed in seeds)


def test_dropout_is_each_clients_own_and_off_in_evaluation() -> None:
    model = load(task(Lora(rank=4, dropout=0.5), dtype="float64"))
    trees = [trained(model, seed) for seed in range(2)]
    clients = [[example(5)], [example(7, seed=2)]]

    def losses(first: int, second: int) -> Tensor:
        return model.losses(tree.stack(trees), collate(clients, generators(first, second)))

    both, other = losses(1, 2), losses(1, 3)
    assert both[0] == other[0] and both[1] != other[1]
    for k, seed in enumerate((1, 2)):
        alone = model.losses(tree.stack([trees[k]]), collate([clients[k]], generators(seed)))
        assert float((alone[0] - both[k]).abs()) < 1e-12
    off = model.losses(tree.stack(trees), collate(clients))
    assert torch.equal(off, model.losses(tree.stack(trees), collate(clients)))
    assert not torch.equal(off, both)


def test_dropout_keeps_the_mean_of_the_branch() -> None:
    """One linear layer: E[dropout(x)] = x, and a dropped input is 0 or x / (1 - p)."""
    model = load(task(Lora(rank=4, dropout=0.25, targets=("*.1.mlp.down_proj",)), dtype="float64"))
    params, batch = trained(model), collate([[example(6)]])
    layer = model.base.model.get_submodule("model.layers.1.mlp.down_proj")
    seen: list[Tensor] = []
    handle = layer.register_forward_hook(lambda _module, _inputs, output: seen.append(output[0]))
    try:
        off = model.adapter.hidden(tree.stack([params]), batch)
        base = model.adapter.hidden({}, batch)
        for seed in range(100):
            model.adapter.hidden(tree.stack([params]), collate([[example(6)]], generators(seed)))
    finally:
        handle.remove()
    whole, plain, drawn = seen[0], seen[1], torch.stack(seen[2:])
    assert not torch.equal(off, base)
    spread = float((drawn - whole).norm(dim=(1, 2)).mean())
    assert float((drawn.mean(0) - whole).norm()) < 3 * spread / math.sqrt(100)
    assert float((whole - plain).norm()) > 5 * float((drawn.mean(0) - whole).norm())


def test_threads_that_share_a_base_model_do_not_meet() -> None:
    model = load(task(Lora(rank=4)))
    trees, batch = [trained(model, seed) for seed in range(2)], collate([[example(9)]])
    expected = [gradients(model, [params], batch) for params in trees]
    found: dict[int, list[Tree]] = {0: [], 1: []}
    start = Barrier(2)

    def run(k: int) -> None:
        start.wait()
        found[k] = [gradients(model, [trees[k]], batch) for _ in range(5)]

    threads = [Thread(target=run, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k in range(2):
        assert len(found[k]) == 5 and all(tree.equal(grads, expected[k]) for grads in found[k])


def test_the_base_model_keeps_its_names_and_weights() -> None:
    plain, model = load_base("tiny-llama", dtype="float32").model, load(task(Lora(rank=4)))
    gradients(model, [trained(model)], collate([[example(9)]]))
    assert tree.equal(model.base.model.state_dict(), plain.state_dict())
    assert not any(leaf.requires_grad or leaf.grad is not None for leaf in model.base.model.parameters())


# a scope that freezes one factor


def test_a_frozen_factor_is_a_constant_of_the_run() -> None:
    lora = Lora(rank=4)
    whole = load(task(lora))
    params, batch = whole.initial_params(KEY), collate([[example(9)], [example(5, seed=1)]])
    half = load(task(lora, scope=Scope(freeze=("*lora_A",)))).with_constants(KEY)
    trained_leaves = half.initial_params(KEY)
    assert set(trained_leaves) == {name for name in params if name.endswith("lora_B")}
    moved = {name: leaf + 0.1 for name, leaf in trained_leaves.items()}
    both = [{**params, **moved}] * 2
    expected, found = gradients(whole, both, batch), gradients(half, [moved] * 2, batch)
    assert found.keys() == moved.keys()
    assert all(apart(grad, expected[name]) < SINGLE for name, grad in found.items())


# refusals


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"rank": 0}, "rank is 0; it must be 1 or more"),
        ({"dropout": 1.0}, r"dropout is 1.0; it must be in \[0, 1\)"),
        ({"dropout": -0.1}, "dropout is -0.1"),
        ({"alpha": 0.0}, "alpha is 0.0; it must be above 0"),
        ({"alpha": math.inf}, "alpha is inf"),
        ({"targets": ()}, "targets is empty"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        Lora(**settings)


def test_targets_and_ranks_that_fit_no_layer_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"'q_porj' fits no layer; did you mean 'q_proj'"):
        load(task(Lora(targets=("q_porj",))))
    with pytest.raises(ConfigError, match=r"rank is 33, above the size 32x64 of layer .*\.k_proj"):
        load(task(Lora(rank=33)))
    with pytest.raises(CheckError, match=r"task.scope.freeze: '\*lora_a' fits no tensor"):
        load(task(Lora(), scope=Scope(freeze=("*lora_a",)))).initial_params(KEY)
    with pytest.raises(CheckError, match="selects no tensor"):
        load(task(Lora(), scope=Scope(freeze=("*",)))).initial_params(KEY)


# the real model


@pytest.mark.model
def test_peft_loads_what_is_saved_of_the_real_model(smollm2: str, tmp_path: Path) -> None:
    from peft import PeftModel

    model = load(Task(smollm2, adapter=Lora(rank=4, targets=("q_proj", "down_proj")), dtype="float32"))
    params = trained(model)
    tokens = torch.tensor([model.prompt({"prompt": "Name a fruit.", "response": ""})])
    with torch.no_grad():
        found, _ = model.adapter.logits(params, tokens, torch.ones_like(tokens), None)
        base, _ = model.adapter.logits({}, tokens, torch.ones_like(tokens), None)
    model.adapter.save(params, tmp_path, str(model.base.folder))
    load.cache_clear()
    other = PeftModel.from_pretrained(load_base(smollm2, dtype="float32").model, tmp_path)
    with torch.no_grad():
        expected = other(tokens).logits[:, -1]
    assert float((found - expected).norm() / expected.norm()) < 1e-4
    assert float((found - base).norm() / base.norm()) > 1e-2
