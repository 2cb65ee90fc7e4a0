"""Bytes, wherever they are."""
