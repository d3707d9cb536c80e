"""Creates, loads and saves models, tokenizers and model cards, on disk and from the Hugging Face hub.

Reading a file never executes code in it.
"""
