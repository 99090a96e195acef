"""The grid of ranks: who is where, what is summed over whom, and who owns which sharded fp32 value."""
