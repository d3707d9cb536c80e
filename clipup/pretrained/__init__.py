"""Models from and to disk and the Hugging Face hub: creating, loading and saving them, with their tokenizers and cards.

Nothing in a file that is read is executed.
"""
