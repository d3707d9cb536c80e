"""Implementations of the ops: C++ (``cpp``, ``cpp_cuda``), torch's matmul per expert (``torch_matmul``) and plain torch
(``torch_eager``), beside Triton (``clipup_kernels.triton``). ``registry`` says which of them runs where.
"""
