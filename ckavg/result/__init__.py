"""What is written: shards, side files, record and card; staged beside their place, synced, then renamed."""
