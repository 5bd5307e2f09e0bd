"""JSON Schemas of what the command line prints, and of the files it reads."""
