from small_pictograms import read  # noqa: F401
