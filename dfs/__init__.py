"""Shared core, client library and command line of the distributed file system."""
