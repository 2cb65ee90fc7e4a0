"""Pass 2: the update rules of the schemes, replayed on tiles of the checkpoints. Knows nothing of where they lie."""
