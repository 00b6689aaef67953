"""`python -m metadata`: the metadata daemon of a node."""

from dfs.cluster.map import METADATA
from dfs.daemon import main
from metadata.service import MetadataNode

if __name__ == "__main__":
    main(METADATA, MetadataNode)
