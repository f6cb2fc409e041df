"""PTX wrappers (the .cuh files, for device code) and the generator of the WGMMA ones."""
