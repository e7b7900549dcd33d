"""One client's share of the peer stack: PEFT's LoRA around a model, trained by TRL's SFTTrainer."""

from __future__ import annotations

import argparse
import tempfile

import torch
from batches import Row
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

disable_progress_bars()


def adapted(options: argparse.Namespace) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """The model with a fresh adapter on every linear layer, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
    lora = LoraConfig(r=options.rank, lora_alpha=options.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, lora), AutoTokenizer.from_pretrained(options.model)


def tune(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, rows: list[Row], options: argparse.Namespace, folder: str
) -> int:
    """Train on the rows in their order, once; the number of tokens, padding left out."""
    config = SFTConfig(
        output_dir=folder,
        per_device_train_batch_size=options.batch,
        max_steps=len(rows) // options.batch,
        max_length=options.max_length,
        learning_rate=options.lr,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        bf16=options.dtype == "bfloat16",
        gradient_checkpointing=False,  # slower where memory is not short
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    trainer = SFTTrainer(model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    trainer.train()
    return sum(map(len, trainer.train_dataset["input_ids"]))


def scratch() -> tempfile.TemporaryDirectory[str]:
    """A folder for what the trainer writes."""
    return tempfile.TemporaryDirectory(prefix="peer-")
