"""Stages: each turns one artifact into another."""
