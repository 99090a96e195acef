"""What a run shows while it goes: logs, metrics, speed."""
