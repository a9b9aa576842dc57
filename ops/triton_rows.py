"""Launches the Triton kernels that work token by token: norms, rope with the cache write, gated activations.

Each reads its inputs once and writes its outputs once; all are bound by memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tercet.ops import kernels_rows
from tercet.ops.kv_write import check_kv_scales
from tercet.ops.launch import Kernel
from tercet.ops.triton_support import next_power_of_2, programmatic_launch

_gated_activation_kernel = Kernel(kernels_rows.gated_activation_kernel)
_logsumexp_and_rank_kernel = Kernel(kernels_rows.logsumexp_and_rank_kernel)
_rms_norm_kernel = Kernel(kernels_rows.rms_norm_kernel)
_rope_and_write_kv_kernel = Kernel(kernels_rows.rope_and_write_kv_kernel)

_ACTIVATION_BLOCK = 1024
_VOCAB_BLOCK = 4096
_HEADS_PER_PROGRAM_ELEMENTS = 1024  # a program takes as many heads as make this many elements


def rms_norm(x: Tensor, weight_D: Tensor, eps: float, weight_offset: float = 0.0) -> Tensor:
    """As `ops.rms_norm`, for float16, bfloat16 and float32."""
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch_norm(out, x, x, x, weight_D, eps, weight_offset, add=False)
    return out


def add_rms_norm(
    x: Tensor, residual: Tensor, weight_D: Tensor, eps: float, weight_offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """As `ops.add_rms_norm`, for float16, bfloat16 and float32."""
    x, residual = x.contiguous(), residual.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch_norm(out, total, x, residual, weight_D, eps, weight_offset, add=True)
    return out, total


def _launch_norm(
    out: Tensor,
    total: Tensor,
    x: Tensor,
    residual: Tensor,
    weight_D: Tensor,
    eps: float,
    weight_offset: float,
    *,
    add: bool,
) -> None:
    size = weight_D.shape[0]
    padded = next_power_of_2(size)
    num_rows = x.numel() // size
    launch = programmatic_launch(x.device, num_rows)
    _rms_norm_kernel[(num_rows,)](
        out,
        total,
        x,
        residual,
        weight_D,
        eps,
        weight_offset,
        D=size,
        D_PAD=padded,
        ADD=add,
        PDL=bool(launch),
        num_warps=min(max(padded // 512, 1), 16),
        **launch,
    )


def rope_and_write_kv(
    qkv_THD: Tensor,
    cos_TR: Tensor,
    sin_TR: Tensor,
    kv_cache: Tensor,
    slot_mapping_T: Tensor,
    *,
    qk_norm: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
    weight_offset: float = 0.0,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> Tensor:
    """As `ops.rope_and_write_kv`, for float16, bfloat16 and float32."""
    num_tokens, num_all, head_dim = qkv_THD.shape
    num_kv_heads = kv_cache.shape[3]
    num_heads = num_all - 2 * num_kv_heads
    if num_heads < 1 or head_dim != kv_cache.shape[4]:
        raise ValueError(f"heads {tuple(qkv_THD.shape)} do not fit the cache {tuple(kv_cache.shape)}")
    qkv_THD = qkv_THD.contiguous()
    if not kv_cache.is_contiguous():
        raise ValueError(f"the cache {tuple(kv_cache.shape)} must be contiguous")
    check_kv_scales(kv_cache.dtype, k_scale, v_scale)
    q_THD = torch.empty((num_tokens, num_heads, head_dim), dtype=qkv_THD.dtype, device=qkv_THD.device)
    q_weight, k_weight = (qkv_THD, qkv_THD) if qk_norm is None else qk_norm
    padded = next_power_of_2(head_dim)
    heads = min(next_power_of_2(num_all), max(1, _HEADS_PER_PROGRAM_ELEMENTS // padded))
    launch = programmatic_launch(qkv_THD.device, num_tokens)
    _rope_and_write_kv_kernel[(num_tokens, -(-num_all // heads))](
        q_THD,
        kv_cache,
        kv_cache.stride(0),
        qkv_THD,
        cos_TR.contiguous(),
        sin_TR.contiguous(),
        slot_mapping_T,
        q_weight,
        k_weight,
        eps,
        weight_offset,
        k_scale,
        v_scale,
        H=num_heads,
        K=num_kv_heads,
        D=head_dim,
        R=cos_TR.shape[-1],
        NORM=qk_norm is not None,
        D_PAD=padded,
        HEADS=heads,
        PDL=bool(launch),
        num_warps=4,
        **launch,
    )
    return q_THD


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """As `ops.silu_and_mul`, for float16, bfloat16 and float32."""
    return _launch_activation(gate_up, gelu=False)


def gelu_tanh_and_mul(gate_up: Tensor) -> Tensor:
    """As `ops.gelu_tanh_and_mul`, for float16, bfloat16 and float32."""
    return _launch_activation(gate_up, gelu=True)


def _launch_activation(gate_up: Tensor, *, gelu: bool) -> Tensor:
    gate_up = gate_up.contiguous()
    *lead, both = gate_up.shape
    size = both // 2
    out = torch.empty((*lead, size), dtype=gate_up.dtype, device=gate_up.device)
    block = min(_ACTIVATION_BLOCK, next_power_of_2(size))
    num_rows = out.numel() // size
    launch = programmatic_launch(gate_up.device, num_rows)
    _gated_activation_kernel[(num_rows, -(-size // block))](
        out, gate_up, F=size, GELU=gelu, BLOCK=block, PDL=bool(launch), num_warps=4, **launch
    )
    return out


def logsumexp_and_rank(logits_TV: Tensor, chosen_logit_T: Tensor) -> tuple[Tensor, Tensor]:
    """As `ops.logprobs.logsumexp_and_rank`."""
    logits_TV = logits_TV.contiguous()
    num_rows, vocab_size = logits_TV.shape
    total_T = torch.empty(num_rows, dtype=torch.float32, device=logits_TV.device)
    rank_T = torch.empty(num_rows, dtype=torch.int32, device=logits_TV.device)
    if num_rows:
        _logsumexp_and_rank_kernel[(num_rows,)](
            total_T,
            rank_T,
            logits_TV,
            chosen_logit_T.contiguous(),
            vocab_size,
            BLOCK=_VOCAB_BLOCK,
            num_warps=8,
        )
    return total_T, rank_T
