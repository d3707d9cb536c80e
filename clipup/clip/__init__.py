"""CLIP models: where their towers and blocks are, what they take, padding-aware text towers, acceleration for
inference, and FLOPs.
"""
