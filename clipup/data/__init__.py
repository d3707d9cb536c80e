"""Data: shards, CSV files and images, read and written.

``loaders`` is the interface: training batches and evaluation samples, with the options in ``options``. ``formats`` is
the table of formats. Each is a module, ``shards`` (with ``shard_names`` and ``tars``) or ``csv_files``: it makes the
``Source`` of a training and the ``samples`` of an evaluation. Training batches are ``indexed`` (CSV files and local
shards, in the order of ``epoch_order``, in memory if wanted) or ``streamed`` (shards by URL, or resampled); both share
``train_data``. ``evaluation`` reads the samples of an evaluation. ``images`` decodes, and ``skips`` counts what cannot
be read. ``shard_writer`` writes data sets; ``own_pairs`` makes a data set of a CSV file or a folder.
"""
