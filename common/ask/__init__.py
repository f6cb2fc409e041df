"""What is asked of a kernel tree: the checks of a call, and the Problem that it states."""
