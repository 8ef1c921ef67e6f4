"""Serving: records turned into the files that servers read, and the code that runs inside servers."""
