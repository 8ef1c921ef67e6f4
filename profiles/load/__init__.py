"""Load: what is sent, when, and how it is timed."""
