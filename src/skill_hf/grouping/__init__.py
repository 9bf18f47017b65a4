"""Which layers of a teacher belong together."""
