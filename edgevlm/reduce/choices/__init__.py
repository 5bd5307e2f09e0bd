"""Selectors: which tokens are kept, one per file."""
