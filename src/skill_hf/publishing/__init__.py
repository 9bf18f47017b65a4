"""What a run leaves to read: record, model card, figures, and the way to the Hub."""
