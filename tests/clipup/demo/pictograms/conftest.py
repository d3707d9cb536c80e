from small_pictograms import all_concepts, all_splits, in_the_small, read, small  # noqa: F401
