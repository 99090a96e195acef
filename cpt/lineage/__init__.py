"""What a model descends from: the tree of runs, what they consumed, and in which order."""
