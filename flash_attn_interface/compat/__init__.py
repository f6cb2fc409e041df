"""Shapes that other programs expect: upstream's compiled extensions and private operators."""
