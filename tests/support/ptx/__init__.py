"""An executor of PTX: what Triton and nvcc compile for a GPU runs on a CPU, and faults of threads are found.

    program = parser.parse(text)
    machine.launch(program, grid, threads, arguments, extents, shared_bytes)

Every register is a numpy array over the threads of several blocks; a mask handles divergence.
Known are the instructions in ``arithmetic``, ``warps``, ``moves``, ``instructions`` and ``hopper``; others are errors
that name them. Section numbers refer to the manual of PTX ISA 8.8. Only ``triton_driver`` knows Triton, and only
``cuda_driver`` nvcc.
"""
