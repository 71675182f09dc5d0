"""Device facts, settings, launch plans and the tuned table: what every kernel family stands on."""
