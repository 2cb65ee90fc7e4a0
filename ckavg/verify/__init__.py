"""Stage *verify*: a result is read again and checked. Writes nothing, anywhere."""
