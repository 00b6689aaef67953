"""Chunk format and chunker (pure)."""
