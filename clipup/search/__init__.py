"""Searching one's own images by text or by an image: an index of features on disk, and a page of what was found.

``clipup index`` and ``clipup search`` are its commands.
"""

from .image_index import ImageIndex, default_directory, index_images, update_index
from .results import Result, find, results_page

__all__ = ["ImageIndex", "Result", "default_directory", "find", "index_images", "results_page", "update_index"]
