"""The sparse layer: ``SparseMoE`` (``layer``), its options (``config``), router, auxiliary losses and experts."""
