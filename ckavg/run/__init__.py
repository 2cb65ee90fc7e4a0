"""What a trainer saved: layouts, discovery, selection and checks. Reads names, sizes and headers; never a weight."""
