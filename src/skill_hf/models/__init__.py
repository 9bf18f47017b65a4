"""What a student is, and the encoders that it comes from."""
