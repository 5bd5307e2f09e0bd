"""Merges: tokens that are alike become one, one per file."""
