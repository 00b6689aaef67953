"""State of one file system: items, prolly tree, view, effects, extents (pure)."""
