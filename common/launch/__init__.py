"""From machine code and tensors to a launch, on a GPU or in the simulator."""
