"""Token shards: a corpus on disk, made in parallel, read in one global order. Knows nothing of models."""

from data_shards.errors import DataError
from data_shards.format import Encoding, ShardWriter
from data_shards.loader import Source, TokenLoader
from data_shards.order import BlockOrder, GlobalOrder, MixtureOrder
from data_shards.prepare import Encoded, PrepareSummary, Rejected, prepare
from data_shards.reader import ShardedTokens
from data_shards.samples import Batch

__all__ = [
    "Batch",
    "BlockOrder",
    "DataError",
    "Encoded",
    "Encoding",
    "GlobalOrder",
    "MixtureOrder",
    "PrepareSummary",
    "Rejected",
    "ShardWriter",
    "ShardedTokens",
    "Source",
    "TokenLoader",
    "prepare",
]
