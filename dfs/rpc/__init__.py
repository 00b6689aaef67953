"""The only package with sockets: transport, client, server, pool, retry."""
