"""Data: the pictograms data set and the loaders of training and evaluation.

- `pictograms` builds WebDataset shards from drawings that Python packages carry: `sources` finds the drawings,
  `captions` words them, `splits` decides by hashing who is held out, `shards` writes the files.
- `loaders` serves training batches (WebDataset, CSV, or from memory) and evaluation samples; `describe` reads
  `dataset.json`.

Nothing is imported here: building data needs no torch, and loading it needs none of the packages that carry the
drawings.
"""
