"""Layers that models are built of. Each uses its parameters in its own forward only, for ZeRO-3 gathers them there."""
