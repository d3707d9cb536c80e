"""Data: shards, CSV files and images, read and written.

``loaders`` serves training batches (WebDataset, CSV, or from memory) and evaluation samples. ``shard_names`` says which
shards a source means and reads ``dataset.json``, ``tars`` and ``csv_rows`` read samples, ``images`` decodes, and
``skips`` counts what cannot be read. ``shard_writer`` writes data sets.

Nothing is imported here: writing data needs no torch.
"""
