"""Kernels beside their plain-torch references: one file for each operation, one registry.

Knows tensors, not requests. Call an operation as a function; which implementation runs is decided by device,
dtype and TERCET_OPS (see `registry`):

    from tercet import ops
    out_THD = ops.paged_attention(q_THD, kv_cache, meta, scale=0.125)
"""

from tercet.ops.activation import gelu_tanh_and_mul, silu_and_mul
from tercet.ops.attention import AttentionMetadata, paged_attention
from tercet.ops.kv_write import write_kv
from tercet.ops.norm import add_rms_norm, rms_norm
from tercet.ops.registry import operations
from tercet.ops.rope_kv import rope_and_write_kv
from tercet.ops.rotary import apply_rotary

__all__ = [
    "AttentionMetadata",
    "add_rms_norm",
    "apply_rotary",
    "gelu_tanh_and_mul",
    "operations",
    "paged_attention",
    "rms_norm",
    "rope_and_write_kv",
    "silu_and_mul",
    "write_kv",
]
