"""Skips: what a layer makes of the tokens that pass it and of those that skip it, one file each."""
