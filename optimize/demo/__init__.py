"""The demo, shipped in the wheel: a small network on handwritten digits."""
