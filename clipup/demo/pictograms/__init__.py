"""The pictograms data set: WebDataset shards of emoji and icons from Python packages.

``sources`` finds the drawings, ``splits`` holds some out by hashing, ``build`` writes the shards.
"""
