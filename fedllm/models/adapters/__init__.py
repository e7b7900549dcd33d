"""What trains: LoRA, soft prompts, full weights, norms, biases, and any adapter of peft."""
