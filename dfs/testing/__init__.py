"""The simulator: network, disk, scenarios, oracles; shipped for `dfs sim`."""
