"""What users call: signatures, docstrings, and one call each of `call/`."""
