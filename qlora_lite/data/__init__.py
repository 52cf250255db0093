"""What is read: file line -> Conversation -> Example -> Bin -> Batch."""
