"""Bytes, wherever they are: on this machine, on the Hugging Face Hub, in an object store."""
