"""Tables and bars for a terminal. The only user of rich; everything shown goes to stdout."""
