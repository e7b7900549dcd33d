"""What a step of DP-SGD costs.

    python benchmarks/private_step.py [--clients 4] [--batch 4] [--tokens 64] [--peer]

dpsgd_over_batched_step: processor time of one `dp_sgd` step of a stack over that of one `sgd` step of the same stack
and batch; LoRA rank 8 on all linear layers, AdamW, one thread, noise multiplier 1. `without_noise` has noise multiplier
0, which leaves clipping alone. With --peer, Opacus on PEFT takes the same step, one client after another, in bfloat16
and in float32; the faster one counts.

Both sides take turns, `--pairs` times; the median of the ratios counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fedllm.messages.context import ClientContext, RoundContext, ServerContext
from fedllm.messages.update import Part, Update
from fedllm.models.adapters.lora import Lora
from fedllm.models.base_models.load import materialise
from fedllm.models.batch import IGNORE, Example, collate
from fedllm.models.kernels.prepack import kept_layouts
from fedllm.models.loaded_model import LoadedModel, load
from fedllm.models.task import Task
from fedllm.privacy.noise import NoiseStream, derive, new_key
from fedllm.rng import Key
from fedllm.stages.privacy.gaussian_dp import GaussianDp
from fedllm.tensors import tree
from fedllm.training.base import ClientJob
from fedllm.training.client_stack import keep_buffers
from fedllm.training.dp_sgd import DpSgd
from fedllm.training.sgd import Sgd

LORA = Lora(rank=8, alpha=16)


@dataclass(frozen=True)
class Noise:
    """A client's secret noise."""

    client: str

    def stream(self, purpose: str, digest: bytes) -> NoiseStream:
        """Of a key of its own."""
        return NoiseStream(derive(new_key(), self.client, purpose, digest))


def examples(options: argparse.Namespace, seed: int) -> list[Example]:
    """Random tokens, all of which but the first carry a label."""
    made = []
    for place in range(options.batch):
        generator = torch.Generator().manual_seed(1000 * seed + place)
        tokens = torch.randint(0, 250, (options.tokens,), generator=generator)
        targets = tokens.roll(-1)
        targets[-1] = IGNORE
        made.append(Example(tokens, targets))
    return made


def stepper(model: LoadedModel, work: Sgd, clients: Sequence[list[Example]]) -> Callable[[], object]:
    """One step of a stack, again and again."""
    params = tree.flatten(model.initial_params(Key(0)))
    contexts = [RoundContext(0, Key(0), len(clients), len(clients), client=str(k)) for k in range(len(clients))]
    jobs = [
        ClientJob(ctx, params, own, noise=Noise(str(ctx.client))) for ctx, own in zip(contexts, clients, strict=True)
    ]
    batch, carry = collate(clients, tuple(ctx.rng("dropout") for ctx in contexts)), work.init(jobs)
    return lambda: work.step(carry, [batch], jobs, model)


def opacus_stepper(model: LoadedModel, clients: Sequence[list[Example]], dtype: torch.dtype) -> Callable[[], object]:
    """Opacus' hooks and optimiser on PEFT's LoRA, one client after another."""
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer
    from peft import LoraConfig, get_peft_model
    from torch.nn.functional import cross_entropy
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(str(materialise(model.base)), dtype=dtype)
    lora = LoraConfig(r=LORA.rank, lora_alpha=LORA.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    wrapped = GradSampleModule(get_peft_model(base, lora).train(), loss_reduction="sum")
    leaves = [leaf for leaf in wrapped.parameters() if leaf.requires_grad]
    size = len(clients[0])
    optimizer = DPOptimizer(
        torch.optim.AdamW(leaves, lr=1e-4), noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=size
    )

    def step() -> None:
        for own in clients:
            tokens, targets = (torch.stack([vars(item)[name] for item in own]) for name in ("tokens", "targets"))
            logits = wrapped(input_ids=tokens).logits.float()
            losses = cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORE, reduction="none")
            (losses.sum(1) / (targets != IGNORE).sum(1)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    return step


def seconds(action: Callable[[], object]) -> float:
    """Seconds of processor time of one call, which other work on the machine changes less than those of a clock."""
    started = time.process_time()
    action()
    return time.process_time() - started


def dpsgd_over_batched_step(options: argparse.Namespace) -> dict[str, Any]:
    """The section of this name."""
    torch.set_num_threads(1)
    keep_buffers()
    model = load(Task(options.model, adapter=LORA)).with_constants(Key(0))
    clients = [examples(options, seed) for seed in range(options.clients)]
    private = DpSgd("adamw", lr=1e-4, steps=10**6, batch_size=options.batch, noise_multiplier=1.0)
    with kept_layouts():
        steps: dict[str, Callable[[], object]] = {
            "sgd": stepper(model, Sgd("adamw", lr=1e-4, steps=10**6, batch_size=options.batch), clients),
            "dp_sgd": stepper(model, private, clients),
            "without_noise": stepper(model, replace(private, noise_multiplier=0.0), clients),
        }
        if options.peer:
            kinds = {"opacus_bfloat16": torch.bfloat16, "opacus_float32": torch.float32}
            steps |= {name: opacus_stepper(model, clients, dtype) for name, dtype in kinds.items()}
        for step in steps.values():
            step()
        rounds = [{name: seconds(step) for name, step in steps.items()} for _ in range(options.pairs)]
    found = {f"{name}_step_s": statistics.median(each[name] for each in rounds) for name in steps}
    ratios = {
        f"{name}_over_sgd": statistics.median(each[name] / each["sgd"] for each in rounds)
        for name in steps
        if name != "sgd"
    }
    peers = [found[f"{name}_step_s"] for name in steps if name.startswith("opacus")]
    beside = {"opacus_over_dp_sgd": min(peers) / found["dp_sgd_step_s"]} if peers else {}
    return {**found, **ratios, **beside, "dpsgd_over_batched_step": ratios["dp_sgd_over_sgd"]}


def released(
    *, clients: int, lost: float, values: int, runs: int, noise_multiplier: float, clip: float
) -> Sequence[float]:
    """The noise in sums of `gaussian_dp`, a share of whose clients are lost: what is released less the sum itself."""
    stage, drawn = GaussianDp(clip, noise_multiplier), torch.Generator().manual_seed(0)
    local = ClientContext(RoundContext(0, Key(0), clients, clients, client="one"))
    sent = [
        stage.encode(Update({"delta": Part({"w": torch.randn(values, generator=drawn)}, 1.0)}), {}, {}, local)[0]
        for _ in range(round(clients * (1 - lost)))
    ]
    total = torch.stack([update.parts["delta"].tree["w"] for update in sent]).sum(0)
    found = []
    for _ in range(runs):
        ctx = ServerContext(0, Key(0), clients, clients, expected=float(clients), noise=FreshNoise())
        update = Update({"delta": Part({"w": total}, float(len(sent)))})
        out, _ = stage.decode(update, {}, {}, ctx)
        found += (out.parts["delta"].tree["w"].double() - total).tolist()
    return found


class FreshNoise:
    """A new key for each sum, and no ledger."""

    def release(self, stage: str, kind: str, noise_multiplier: float, digest: bytes) -> NoiseStream:
        """A stream of a new key."""
        return NoiseStream(new_key())

    def measured(self, noised: float, noise: float, clip: float) -> None:
        """Nobody asks."""


def parser() -> argparse.ArgumentParser:
    """The options, at the setting of the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--clients", type=int, default=4, help="clients of the stack")
    parser.add_argument("--batch", type=int, default=4, help="examples of a client in a step")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of an example")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--peer", action="store_true", help="measure Opacus on PEFT beside it")
    return parser


def main() -> None:
    """Print the figures; the last line is JSON."""
    options = parser().parse_args()
    found = dpsgd_over_batched_step(options)
    for name, value in found.items():
        print(f"{name:28} {value:.4f}")
    print(json.dumps({"benchmark": "private_step", **vars(options), **found}))


if __name__ == "__main__":
    main()
