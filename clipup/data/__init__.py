"""Data: shards, CSV files and images, read and written.

``loaders`` is the interface: training batches and evaluation samples, with the options in ``options``. Training batches
come from ``webdataset_pipeline`` (streamed shards), ``csv_batches`` or ``in_memory``, which share ``train_data``.
``shard_names`` expands shard patterns and reads ``dataset.json``, ``tars`` and ``csv_rows`` read samples, ``images``
decodes, and ``skips`` counts what cannot be read. ``shard_writer`` writes data sets.
"""
