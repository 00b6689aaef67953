"""Frames, multiplexing and the RPC catalogue (sans-IO)."""
