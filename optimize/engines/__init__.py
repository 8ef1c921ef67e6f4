"""Engines that work runs on: child processes here."""
