"""The user's settings, with the type and range of each."""
