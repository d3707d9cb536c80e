"""Data: shards, CSV files and images, read and written.

``loaders`` is the interface: training batches and evaluation samples, with the options in ``options``. Training batches
come from ``indexed_batches`` (CSV files and local shards) or ``in_memory``, in the order of ``epoch_order``, or from
``webdataset_pipeline`` (streamed shards); they share ``train_data``.
``shard_names`` expands shard patterns and reads ``dataset.json``, ``tars`` and ``csv_rows`` read samples, ``images``
decodes, and ``skips`` counts what cannot be read. ``shard_writer`` writes data sets.
"""
