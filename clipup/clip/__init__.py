"""CLIP models: their towers and blocks, inputs, padding-aware text, CPU acceleration, FLOPs and the word tokenizer."""
