"""What a trainer saved: layouts, order, selection, headers, checks. Reads no weight."""
