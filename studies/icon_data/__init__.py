"""The icons data set of the studies: 250,000 drawings of an npm package, with their names as captions."""
