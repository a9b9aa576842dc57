"""Kernels beside their plain-torch references: one file for each operation, one registry.

Knows tensors, not requests. Call an operation as a function; which implementation runs is decided by device,
dtype and TERCET_OPS (see `registry`):

    from tercet import ops
    out_THD = ops.paged_attention(q_THD, kv_cache, meta, scale=0.125)
"""

from tercet.ops.activation import gelu_tanh_and_mul, silu_and_mul
from tercet.ops.attention import AttentionMetadata, paged_attention
from tercet.ops.kv_write import write_kv
from tercet.ops.linear import (
    Activation,
    PrecedingNorm,
    add_rms_norm_gated_linear,
    add_rms_norm_linear,
    gated_linear,
    linear,
)
from tercet.ops.norm import add_rms_norm, rms_norm
from tercet.ops.registry import operations
from tercet.ops.rope_kv import rope_and_write_kv
from tercet.ops.rotary import apply_rotary
from tercet.ops.sample_rows import sample_rows
from tercet.ops.step_state import prepare_step

__all__ = [
    "Activation",
    "AttentionMetadata",
    "PrecedingNorm",
    "add_rms_norm",
    "add_rms_norm_gated_linear",
    "add_rms_norm_linear",
    "apply_rotary",
    "gated_linear",
    "gelu_tanh_and_mul",
    "linear",
    "operations",
    "paged_attention",
    "prepare_step",
    "rms_norm",
    "rope_and_write_kv",
    "sample_rows",
    "silu_and_mul",
    "write_kv",
]
