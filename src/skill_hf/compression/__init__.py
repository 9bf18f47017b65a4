"""What can be pruned, what it costs, and how it is removed."""
