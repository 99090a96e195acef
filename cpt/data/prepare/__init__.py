"""Text becomes a corpus: reading inputs, training a tokenizer, building shards, looking at and verifying them."""
