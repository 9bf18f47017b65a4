"""Checkpoints of other programs: read as students, and written from students."""
