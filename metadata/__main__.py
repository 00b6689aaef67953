"""`python -m metadata`: the metadata daemon of a node."""

from functools import partial

from dfs.cluster.map import METADATA
from dfs.daemon import main
from metadata.service import MOST_RESERVE, MetadataNode

if __name__ == "__main__":
    main(METADATA, partial(MetadataNode, reserve=MOST_RESERVE))
