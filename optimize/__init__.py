"""Makes variants of a model, and drives a campaign from end to end."""
