"""Groups the layers of a teacher."""
