"""The icons data set of the studies: 250,000 icons from an npm package, with their names as captions."""
