"""Measurements of this project against others that do the same job, all in one run on one machine."""
