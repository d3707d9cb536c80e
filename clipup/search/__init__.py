"""Searching one's own images by text: an index of features on disk, and a page of what was found.

``clipup index`` and ``clipup search`` are its commands.
"""

from .image_index import ImageIndex, update_index
from .results import Result, find, results_page

__all__ = ["ImageIndex", "Result", "find", "results_page", "update_index"]
