"""Addresses of daemons: `tcp://host:port` or `unix:///path`."""

import ipaddress


def is_address(address: str) -> bool:
    """Whether the text has one of the two forms."""
    if address.startswith("unix:///"):
        return len(address) > len("unix:///")
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    return (
        address.startswith("tcp://") and bool(host) and port.isdecimal() and 0 < int(port) < 65536
    )


def is_local(address: str) -> bool:
    """Whether only this machine can connect: a unix socket or a literal loopback address.

    A host name other than `localhost` may resolve to anything and is not local.
    """
    if address.startswith("unix:"):
        return True
    host = address.removeprefix("tcp://").rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
