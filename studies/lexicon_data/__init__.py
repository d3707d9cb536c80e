"""The lexicon data set: icons whose captions are random vectors, which only memory can give."""
