"""FUSE mount: a thin pyfuse3 adapter over `dfs.client.filesystem`."""
