"""Loaders of data in its usual formats, and what the demonstrations use."""
