"""Where base models come from: a hub folder, a wheel, a GGUF file, quantised."""
