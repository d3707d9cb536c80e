"""CLIP models: their towers and blocks, inputs, padding-aware text, FLOPs and the word tokenizer."""
