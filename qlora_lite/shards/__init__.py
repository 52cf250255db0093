"""Files of weights: read one tensor or slice at a time, write shards of bounded size."""
