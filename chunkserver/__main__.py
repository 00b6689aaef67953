"""`python -m chunkserver`: the chunk daemon of a node."""

from chunkserver.service import ChunkNode
from dfs.cluster.map import CHUNK
from dfs.daemon import main

if __name__ == "__main__":
    main(CHUNK, ChunkNode)
