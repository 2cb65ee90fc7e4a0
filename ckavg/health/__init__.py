"""Stage *health*: one reading of all weights, and what it reveals. Plan, hashing, statistics, reading, findings."""
