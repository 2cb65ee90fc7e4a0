"""Tables and bars for a terminal, and pictures. Where rich and matplotlib are used, beside the progress display."""
