"""From a KernelSpec to machine code: sources, compiler, and the store of compiled kernels."""
