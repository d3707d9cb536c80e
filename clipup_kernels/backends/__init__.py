"""The code that answers the ops: C++ (``cpp``), torch's matmul per expert (``torch_matmul``), plain torch
(``torch_eager``) and Triton (``clipup_kernels.triton``), and which of them answers where.
"""
