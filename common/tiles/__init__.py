"""Tile sizes: the tables of the autotuner, and what both trees' planners share."""
