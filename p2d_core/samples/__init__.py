"""Samples: one schema for every file, and their way into token batches."""
