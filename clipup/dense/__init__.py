"""What a dense MLP is made of: the families of MLPs that are read (``mlp_families``), their parts in one form
(``dense_mlp``), and dense layers with packed weights (``prepared``).
"""
