"""Measuring: rounds, statistics, capacity, resources and the host."""
