"""Adapters of the `Cluster` port: where candidates are deployed."""
