"""Dense MLPs: the families that are read (``mlp_families``), their parts in one form (``dense_mlp``), and the initial
experts made from them (``expert_init``).
"""
