"""How a variant is served, and how it behaves when it is."""
