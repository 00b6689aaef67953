"""Chunkserver: append-only segments of verified chunks."""
