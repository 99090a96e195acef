"""Text becomes a corpus, a corpus becomes windows, windows become batches."""
