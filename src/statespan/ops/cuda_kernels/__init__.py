"""The common ground of the CUDA backends: C++ kernels compiled at run time, and their launch on PyTorch's stream.

Nothing here is imported before a CUDA tensor comes.
"""

from statespan.ops.cuda_kernels.launcher import Kernel, Launch, address, allow_shared, enter, scalar_type

__all__ = ["Kernel", "Launch", "address", "allow_shared", "enter", "scalar_type"]
