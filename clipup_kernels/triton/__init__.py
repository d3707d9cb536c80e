"""The ops on CUDA devices as Triton kernels; no compiler is needed and the host never waits.

A file holds the kernels of one stage (jitted, private) and the plain functions that launch them. These have the names,
arguments and outputs of the functions in ``generic.py``, so that ``cuda.py`` can choose by op:

    router.py     router_logits and its backward
    gating.py     topk_gating and its backward
    dispatch.py   dispatch: a stable counting sort
    rows.py       permute, gather_sum, combine and its backward

Beside them every file has ``variants(arch)``: what may be launched on that architecture, for compiling it without a GPU
(``variants.py``). Nothing here is imported before an op meets a CUDA tensor.

Rules that all kernels keep: sums in float32 in a fixed order, no floating-point atomics, offsets of rows in 64 bits,
row and token counts without specialisation (a new batch size compiles nothing).
"""
