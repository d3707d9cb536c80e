"""The public ops: argument checks, schema, autograd and FLOP formula; ``backends`` computes them."""
