"""Packaged tuned tables: a bundle per device, ``<device>.json``, as ``autotune export`` writes."""
