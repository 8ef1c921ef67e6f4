"""A Core 2 pipeline of models: what it is, where it saturates, which variants it should have, how it is sized."""
