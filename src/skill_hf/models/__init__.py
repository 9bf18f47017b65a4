"""Student models, and loading of encoders."""
