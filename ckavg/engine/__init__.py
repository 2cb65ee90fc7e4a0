"""How a pass streams: blocks and tiles, their reading, the threads that work on them. Knows no scheme and no norm."""
