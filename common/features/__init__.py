"""Feature blocks: what the planners know about a feature, in one module for each.

`union.py` says what a block has, and makes a kernel's constants and parameter values of all blocks.
"""
