"""Cluster map and placement: which nodes hold which partition (pure)."""
