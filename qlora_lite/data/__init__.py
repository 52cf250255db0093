"""From files to batches: file line -> Conversation -> Example -> Bin -> Batch."""
