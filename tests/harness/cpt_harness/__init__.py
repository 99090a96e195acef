"""Shared by tests that run something: ranks as forked processes, a tiny model, small corpora and runs."""
