"""Data: shards, CSV files and images, read and written.

``loaders`` is the interface: training batches and evaluation samples, with the options in ``options``. There are two
paths to training batches: ``indexed`` (CSV files and local shards, by number from ``sources``, in the order of
``epoch_order``, in memory if wanted) and ``streamed`` (shards by URL, or resampled); they share ``train_data``. An
evaluation has a list of ``samples``. ``shard_names`` expands shard patterns and reads ``dataset.json``, ``tars`` and
``csv_rows`` read samples, ``images`` decodes, and ``skips`` counts what cannot be read. ``shard_writer`` writes data
sets.
"""
