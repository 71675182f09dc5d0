"""Packaged tuned tables: ``v1/<environment>/<operator>/<problem>.json``."""
