"""Runtime and device code shared by the kernel trees. Importing touches neither CUDA nor disk."""
