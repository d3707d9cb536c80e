"""The pictograms data set: WebDataset shards of drawings that Python packages carry. ``sources`` finds the drawings,
``splits`` decides by hashing which are held out, ``build`` writes the shards.
"""
