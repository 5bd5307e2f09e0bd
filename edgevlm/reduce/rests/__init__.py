"""What becomes of tokens that were not chosen, one per file."""
