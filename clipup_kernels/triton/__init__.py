"""The ops on CUDA devices as Triton kernels, and the host never waits. Triton needs a C compiler and Python's headers.

A file has the kernels of one stage (jitted, private) and the functions that launch them. These have the names,
arguments and outputs of the functions in ``backends/torch_eager.py``; ``backends/registry.py`` chooses them by op:

    router_logits.py   router_logits and its backward
    topk_gating.py     topk_gating and its backward
    dispatch.py        dispatch: a stable counting sort
    rows.py            permute, gather_sum, combine and its backward
    grouped_linear.py  grouped_linear and its backward
    expert_mlp.py, expert_mlp_backward.py   experts forward and backward, on grouped_gemm.py and weight_gradient.py

Every file of a stage also has ``variants(arch)``: the kernels that may be launched on an architecture, to compile them
without a GPU (``variants.py``). Nothing here is imported before an op is called with a CUDA tensor.

Rules for all kernels: sums in float32 in a fixed order, no floating-point atomics, 64-bit row offsets, no
specialization on row and token counts (a new batch size compiles nothing).
"""
