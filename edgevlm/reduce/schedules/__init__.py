"""Schedules: which layers of the decoder tokens may skip, and how many pass each."""
