"""Names for the contents of full blocks: a keyed hash chained over the prefix.

The hash of a block covers everything that its keys and values depend on: the tagged fields of the root
(salt, adapter) and every token up to its end. The key is drawn at each start, so that nobody outside can
construct a collision; the pool compares the tokens as well.

Source: requirement R10 (keyed 128-bit hash over tagged fields, tokens compared on a hit).
"""

from __future__ import annotations

import secrets
from hashlib import blake2b
from typing import NewType

import numpy as np

BlockHash = NewType("BlockHash", bytes)
_DIGEST_BYTES = 16


class BlockHasher:
    """Hashes blocks of `block_size` tokens."""

    def __init__(self, block_size: int, key: bytes | None = None) -> None:
        self.block_size = block_size
        self._key = key or secrets.token_bytes(32)

    def root(self, cache_salt: str, adapter: str) -> BlockHash:
        """Parent of a sequence's first block. Fields are length-prefixed: none can pass for another."""
        fields = b"".join(len(f).to_bytes(4, "little") + f for f in (cache_salt.encode(), adapter.encode()))
        return BlockHash(blake2b(b"root" + fields, digest_size=_DIGEST_BYTES, key=self._key).digest())

    def extend(self, chain: list[BlockHash], root: BlockHash, token_ids: np.ndarray) -> None:
        """Append to `chain` the hashes of full blocks of `token_ids` (i32) that it does not have yet."""
        size = self.block_size
        data = token_ids.tobytes() if len(chain) * size + size <= len(token_ids) else b""
        width = size * token_ids.itemsize
        parent = chain[-1] if chain else root
        for start in range(len(chain) * width, len(data) - width + 1, width):
            body = parent + data[start : start + width]
            parent = BlockHash(blake2b(body, digest_size=_DIGEST_BYTES, key=self._key).digest())
            chain.append(parent)
