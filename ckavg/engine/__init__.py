"""How a pass streams: blocks and tiles, reading them, and the threads that work on them. Knows no scheme and no norm."""
