"""The `dfs` command."""
