"""`python -m flash_attn_interface.tune`: measures tiles and writes tables of the fastest."""
