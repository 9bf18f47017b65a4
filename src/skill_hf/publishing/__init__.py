"""Publishes a run: record, model card, figures, upload to the Hub."""
