"""Metadata node: LSM store, blobs, journals and volume homes."""
