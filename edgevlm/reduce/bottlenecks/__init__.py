"""Bottlenecks: rows by which alone what follows a picture sees it."""
