"""Scorers: which tokens matter, one per file."""
