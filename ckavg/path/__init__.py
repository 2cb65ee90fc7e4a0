"""Pass 1: how far the weights travelled. σ, ℓ and the table of both."""
