"""What a researcher writes by hand: PyTorch and PEFT, padded batches, one client after another, the mean of adapters.

It knows neither fedllm nor TRL; any environment with torch, transformers and peft runs it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import batches
import torch
from batches import Row
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

IGNORE = -100


def encoded(row: Row, tokenizer: PreTrainedTokenizerBase, max_length: int) -> tuple[list[int], list[int]]:
    """Tokens and labels of one row; the prompt carries no labels, the end token does."""
    prompt = tokenizer(row["prompt"])["input_ids"]
    answer = tokenizer(row["completion"] + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    return (prompt + answer)[:max_length], ([IGNORE] * len(prompt) + answer)[:max_length]


def padded(
    rows: list[Row], tokenizer: PreTrainedTokenizerBase, options: argparse.Namespace
) -> Iterator[dict[str, Tensor]]:
    """Batches of `options.batch` rows, filled up on the right to the longest of each."""
    pairs = [encoded(row, tokenizer, options.max_length) for row in rows]
    filler, device = tokenizer.eos_token_id, options.device  # masked, so any token will do
    for at in range(0, len(pairs), options.batch):
        batch = pairs[at : at + options.batch]
        width = max(len(tokens) for tokens, _ in batch)
        gaps = [width - len(tokens) for tokens, _ in batch]
        yield {
            "input_ids": torch.tensor([t + [filler] * g for (t, _), g in zip(batch, gaps, strict=True)], device=device),
            "attention_mask": torch.tensor([[1] * (width - gap) + [0] * gap for gap in gaps], device=device),
            "labels": torch.tensor([y + [IGNORE] * g for (_, y), g in zip(batch, gaps, strict=True)], device=device),
        }


def trained(model: PeftModel, steps: Iterator[dict[str, Tensor]], options: argparse.Namespace) -> int:
    """One client's steps with an AdamW of its own; the number of tokens, padding left out."""
    leaves = [leaf for leaf in model.parameters() if leaf.requires_grad]
    optimizer = torch.optim.AdamW(leaves, lr=options.lr, weight_decay=0.0, fused=True)
    tokens = torch.zeros((), dtype=torch.long, device=options.device)
    for batch in steps:
        with torch.autocast(options.device, dtype=torch.bfloat16, enabled=options.dtype == "bfloat16"):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        tokens += batch["attention_mask"].sum()
    return int(tokens)


def main() -> None:
    """Run all rounds; the last line is JSON."""
    parser = batches.arguments(__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    work = batches.read(options.batches, options.batch)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    base = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
    lora = LoraConfig(r=options.rank, lora_alpha=options.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, lora).to(options.device)
    leaves = [leaf for leaf in model.parameters() if leaf.requires_grad]

    def one_round(place: int) -> int:
        start = [leaf.detach().clone() for leaf in leaves]
        total, tokens = [torch.zeros_like(leaf) for leaf in start], 0
        for rows in work.rows[place].values():
            torch._foreach_copy_([leaf.data for leaf in leaves], start)
            tokens += trained(model, padded(rows, tokenizer, options), options)
            torch._foreach_add_(total, [leaf.detach() for leaf in leaves])
        torch._foreach_copy_([leaf.data for leaf in leaves], [leaf / len(work.clients) for leaf in total])
        return tokens

    batches.timed(work, one_round)


if __name__ == "__main__":
    main()
