"""Shipped profiles: levels of proof, load and hardware."""
