"""The demonstration: a tiny CLIP trained on pictograms, upcycled, and compared with the dense one continued.

``run`` does all of it and leaves ``report.json`` and ``report.html``; ``clipup demo`` is its command.
"""

from .run import DemoOptions, run

__all__ = ["DemoOptions", "run"]
