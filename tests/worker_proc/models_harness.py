"""Runs a model over a paged KV cache by hand, with blocks handed out in shuffled order."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tercet.ops import AttentionMetadata
from tercet.worker_proc.models.decoder import CausalLM


class PagedRunner:
    """Keeps the blocks and lengths of some sequences and runs steps over them.

    The tables are padded with the null block, and the bounds given to attention are above the lengths, as
    they are in the worker.
    """

    def __init__(self, model: CausalLM, num_blocks: int = 64, block_size: int = 4, seed: int = 0) -> None:
        self.model = model
        self.block_size = block_size
        weight = next(model.parameters())
        shape = (2, num_blocks, block_size, model.num_kv_heads, model.head_dim)
        self.kv_caches = [
            torch.zeros(shape, dtype=weight.dtype, device=weight.device) for _ in range(model.num_layers)
        ]
        self.device = weight.device
        self.free = list(range(1, num_blocks))
        random.Random(seed).shuffle(self.free)
        self.blocks: dict[str, list[int]] = {}
        self.lengths: dict[str, int] = {}

    def step(
        self, decodes: dict[str, int], chunks: dict[str, list[int]], num_frozen: int = 0
    ) -> dict[str, Tensor]:
        """One forward.

        Args:
            decodes: sequence -> its next token.
            chunks: sequence -> its next tokens.
            num_frozen: padding rows between decodes and chunks, with length 0.

        Returns:
            sequence -> logits [its tokens of this step, V].
        """
        rows: dict[str, list[int]] = {name: [token] for name, token in decodes.items()}
        frozen: dict[str, list[int]] = {f"frozen {i}": [0] for i in range(num_frozen)}
        for name, tokens in (rows | chunks).items():
            self.grow(name, len(tokens))
        rows = rows | frozen | chunks
        meta, positions = self.metadata(rows, len(decodes) + num_frozen)
        tokens = torch.tensor([token for row in rows.values() for token in row], device=self.device)
        with torch.inference_mode():
            hidden = self.model(tokens, positions, self.kv_caches, meta)
            logits = self.model.compute_logits(hidden)
        parts = logits.split([len(row) for row in rows.values()])
        return {name: part for name, part in zip(rows, parts, strict=True) if name not in frozen}

    def grow(self, name: str, count: int) -> None:
        length = self.lengths[name] = self.lengths.get(name, 0) + count
        blocks = self.blocks.setdefault(name, [])
        while len(blocks) * self.block_size < length:
            blocks.append(self.free.pop())

    def metadata(self, rows: dict[str, list[int]], num_decodes: int) -> tuple[AttentionMetadata, Tensor]:
        tables, seq_lens, positions, slots, starts = [], [], [], [], [0]
        width = max(len(self.blocks.get(name, [])) for name in rows) + 3
        for name, tokens in rows.items():
            blocks, length = self.blocks.get(name, [0]), self.lengths.get(name, 0)
            own = range(max(length - len(tokens), 0), max(length, 1))
            tables.append(blocks + [0] * (width - len(blocks)))
            seq_lens.append(length)
            positions += own
            slots += [blocks[i // self.block_size] * self.block_size + i % self.block_size for i in own]
            starts.append(starts[-1] + len(tokens))
        lens = [len(row) for row in rows.values()]

        def tensor(values: list[Any], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=self.device)

        meta = AttentionMetadata(
            num_decodes=num_decodes,
            block_table_BN=tensor(tables, torch.int32),
            seq_lens_B=tensor(seq_lens, torch.int32),
            query_start_B1=tensor(starts, torch.int32),
            slot_mapping_T=tensor(slots, torch.int64),
            max_query_len=max(lens),
            max_seq_len=max(seq_lens) + 3,
            chunk_query_lens=tuple(lens[num_decodes:]),
            chunk_seq_lens=tuple(seq_lens[num_decodes:]),
        )
        return meta, tensor(positions, torch.int64)


def save_tiny_checkpoint(config: Any, path: Path, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A random transformers model of this config, saved at path; biases are random too, not zeros."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.2)
            elif "norm" in name:  # away from the neutral value, which would hide a wrong offset
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(path)
    return model


def reference_logits(model: Any, tokens: list[int]) -> Tensor:
    """transformers' logits for one sequence, [len(tokens), V]."""
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([tokens])).logits[0].float()
    return logits
