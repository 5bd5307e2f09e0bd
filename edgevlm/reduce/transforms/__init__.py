"""Transforms: constant maps of the grid, one per file."""
