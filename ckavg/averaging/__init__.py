"""The plan, the update rules, and the two passes in order."""
