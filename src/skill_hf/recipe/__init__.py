"""What the user decides, with the type and the range of each setting."""
