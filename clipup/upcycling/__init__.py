"""A dense model becomes a sparse one (``upcycle``); whether it computes the same (``step0``), fitting its experts
(``calibration``), and which of a model's blocks can be upcycled (``diagnose``).
"""
