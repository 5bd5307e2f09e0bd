"""Decoding: step graphs, their state, and the loop over them."""
