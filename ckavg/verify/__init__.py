"""Stage *verify*: reads a result again and checks it. Writes nothing."""
