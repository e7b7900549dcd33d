"""TRL's SFTTrainer alone, on all cores: one process, one client after another, no federation around it.

The model is loaded once; each client trains from the adapter that the round began with.
"""

from __future__ import annotations

import batches
import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from tuning import adapted, scratch, tune


def main() -> None:
    """Run all rounds; the last line is JSON."""
    parser = batches.arguments(__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    work = batches.read(options.batches, options.batch)
    model, tokenizer = adapted(options)
    start = {name: leaf.clone() for name, leaf in get_peft_model_state_dict(model).items()}

    def one_round(place: int) -> int:
        tokens = 0
        for client in work.clients:
            set_peft_model_state_dict(model, start)
            with scratch() as folder:
                tokens += tune(model, tokenizer, work.rows[place][client], options, folder)
        return tokens

    batches.timed(work, one_round)


if __name__ == "__main__":
    main()
