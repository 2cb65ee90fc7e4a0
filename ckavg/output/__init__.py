"""A result: layout, staging, side files, card, plots."""
