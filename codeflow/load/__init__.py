"""Shards to training rows; needs torch, pyarrow and numpy only, so it runs on a bare GPU box."""

from codeflow.load.dataset import PackedRow, ShardDataset
from codeflow.load.documents import Segments
from codeflow.load.manifest import Manifest, read_manifest

__all__ = ["Manifest", "PackedRow", "Segments", "ShardDataset", "read_manifest"]
