"""Paged KV accounting: which block is free, used, or kept for its contents.

A block is in exactly one of four places: the null block (0, never handed out), in use (`ref_cnt` > 0), free
without contents, or *evictable*: free, but found again by the hash of its contents until it is needed for
something else. Eviction is least recently used first, and within one request last block first, so that the
start of a shared prefix lives longest.

Source: PagedAttention, Kwon et al. 2023; prefix caching by chained block hash as in vLLM.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from tercet.core_proc.prefix_cache import BlockHash

NULL_BLOCK = 0


class BlockPool:
    """Blocks of one KV group. Block ids are integers in [1, num_blocks)."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._ref_cnt = [0] * num_blocks
        self._free = list(range(num_blocks - 1, 0, -1))
        self._evictable: OrderedDict[int, None] = OrderedDict()
        self._by_hash: dict[BlockHash, int] = {}
        self._hash_of: dict[int, BlockHash] = {}
        self._tokens_of: dict[int, bytes] = {}
        self.num_published = 0  # since the start

    @property
    def num_free(self) -> int:
        """Blocks that can be handed out now, evictable ones included."""
        return len(self._free) + len(self._evictable)

    @property
    def num_cached(self) -> int:
        """Blocks that can be found by their contents."""
        return len(self._by_hash)

    @property
    def usage(self) -> float:
        """Share of all blocks that running requests hold, in [0, 1]."""
        usable = self.num_blocks - 1
        return 1.0 - self.num_free / usable if usable else 1.0

    def allocate(self) -> int | None:
        """A block for new contents, or None where all are in use."""
        if self._free:
            block = self._free.pop()
        elif self._evictable:
            block, _ = self._evictable.popitem(last=False)
            self._forget(block)
        else:
            return None
        self._ref_cnt[block] = 1
        return block

    def allocate_many(self, count: int) -> list[int]:
        """Blocks for new contents; `count` is at most `num_free`."""
        num_blank = min(count, len(self._free))
        blocks = self._free[len(self._free) - num_blank :]
        del self._free[len(self._free) - num_blank :]
        blocks.reverse()
        for block in blocks:
            self._ref_cnt[block] = 1
        for _ in range(count - len(blocks)):
            evicted = self.allocate()
            assert evicted is not None, "more blocks than are free"
            blocks.append(evicted)
        return blocks

    def find(self, block_hash: BlockHash, tokens: bytes) -> int | None:
        """The block that holds these contents. The tokens are compared too: a hash alone is not trusted."""
        block = self._by_hash.get(block_hash)
        return block if block is not None and self._tokens_of[block] == tokens else None

    def find_all(self, hashes: Iterable[BlockHash]) -> list[int]:
        """Blocks known under any of these hashes."""
        return [self._by_hash[block_hash] for block_hash in hashes if block_hash in self._by_hash]

    def is_evictable(self, block: int) -> bool:
        return block in self._evictable

    def share(self, block: int) -> None:
        """One more holder of a block that `find` returned."""
        if self._ref_cnt[block] == 0:
            del self._evictable[block]
        self._ref_cnt[block] += 1

    def publish(self, block: int, block_hash: BlockHash, tokens: bytes) -> None:
        """Let a full block be found by its contents. A second block of equal contents stays private."""
        if block_hash not in self._by_hash and block not in self._hash_of:
            self._by_hash[block_hash] = block
            self._hash_of[block] = block_hash
            self._tokens_of[block] = tokens
            self.num_published += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One holder of these blocks, given in the order of its sequence, lets go."""
        ref_cnt, hash_of = self._ref_cnt, self._hash_of
        for block in reversed(blocks):
            ref_cnt[block] -= 1
            if ref_cnt[block] == 0:
                if block in hash_of:
                    self._evictable[block] = None
                else:
                    self._free.append(block)

    def unpublish(self, blocks: Iterable[int]) -> None:
        """Contents of these blocks are void: never find them again."""
        for block in blocks:
            self._forget(block)
            if block in self._evictable:
                del self._evictable[block]
                self._free.append(block)

    def reset(self) -> bool:
        """Forget all contents. True if none of them was in use."""
        clean = all(self._ref_cnt[block] == 0 for block in self._hash_of)
        self.unpublish(list(self._hash_of))
        return clean

    def _forget(self, block: int) -> None:
        block_hash = self._hash_of.pop(block, None)
        if block_hash is not None:
            del self._by_hash[block_hash]
            del self._tokens_of[block]

    def check_invariants(self, holders: Iterable[Sequence[int]]) -> None:
        """Recount every block against its holders.

        Raises:
            AssertionError: a block is lost, counted wrongly, or in two places.
        """
        counts = [0] * self.num_blocks
        for blocks in holders:
            for block in blocks:
                counts[block] += 1
        assert counts[NULL_BLOCK] == 0, "the null block was handed out"
        assert counts == self._ref_cnt, "reference counts do not match the block tables"
        free = set(self._free)
        assert len(free) == len(self._free), "a block is free twice"
        evictable = set(self._evictable)
        in_use = {block for block, count in enumerate(counts) if count}
        assert not free & evictable and not free & in_use and not evictable & in_use, (
            "a block is in two places"
        )
        assert len(free) + len(evictable) + len(in_use) == self.num_blocks - 1, "a block is lost"
        assert evictable <= self._hash_of.keys(), "an evictable block has no contents"
        assert not free & self._hash_of.keys(), "a free block has contents"
        assert {h: b for b, h in self._hash_of.items()} == self._by_hash, "hash tables disagree"
