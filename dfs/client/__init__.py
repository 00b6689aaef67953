"""The client library: file system (the VFS), files, session, chunk IO."""
