"""A result: its record, its model card, and the directory that holds it, complete or absent."""
