"""Triton bodies of the linear layers for few rows; `triton_linear.py` chooses among them and launches them.

A decode step multiplies a few rows by weights of megabytes: all that counts is that the weights' loads are in
flight from the first cycle to the last. Three shapes of one product x [M, D] times weight [O, D], transposed:

- `gemv_kernel`: a thread multiplies 16-byte pieces of a weight row with the same pieces of every row of x.
- `grouped_linear_kernel`: tensor cores; the warps split D among them, so that a tile of 16 outputs still keeps
  several warps busy and no two programs share an output.
- `tiled_linear_kernel`: tensor cores, one accumulator for each output, which takes D in ascending order
  whatever the tile's size: a row's result does not depend on the rows beside it.

GATED kernels take a merged weight [2 O, D], gate rows first, and give act(gate) * up. With PDL (programmatic
dependent launch, PTX ISA, griddepcontrol) a program starts to read weights, which no kernel writes, while the
kernel before it still runs, and touches nothing else until that one has finished. All accumulate in float32 and
round once, where they store.
"""

import triton
import triton.language as tl
from triton.language.extra import cuda

SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)
PIECE = tl.constexpr(8)  # elements that a thread loads at once: 16 bytes of bfloat16
LINE = tl.constexpr(64)  # elements of a 128-byte line
TILES_M = tl.constexpr(8)  # height of the columns in which tiles are walked


@triton.jit
def activate(gate, up, GELU: tl.constexpr):
    """act(gate) * up, in float32."""
    if GELU:  # 0.5 (1 + tanh(y)) = sigmoid(2 y)
        inner = SQRT_2_OVER_PI * (gate + 0.044715 * gate * gate * gate)
        return gate * tl.sigmoid(2.0 * inner) * up
    return gate * tl.sigmoid(gate) * up


@triton.jit
def norm_of_sum(
    x, residual, total, norm_weight, eps, weight_offset, row, k, D: tl.constexpr, IS_FIRST
):  # fmt: skip
    """Row `row` of norm(x + residual), rounded as `rms_norm_kernel` rounds it; the first program keeps the sum."""
    keep = k < D
    value = tl.load(x + row * D + k, mask=keep, other=0.0)
    added = value.to(tl.float32) + tl.load(residual + row * D + k, mask=keep, other=0.0).to(tl.float32)
    value = added.to(x.dtype.element_ty)
    tl.store(total + row * D + k, value, mask=keep & IS_FIRST)
    value = value.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, 0) / D + eps)
    factor = tl.load(norm_weight + k, mask=keep, other=0.0).to(tl.float32) + weight_offset
    return (value * scale * factor).to(x.dtype.element_ty)


@triton.jit
def gemv_kernel(
    out, x, weight, bias, residual, total, norm_weight, eps, weight_offset, num_out,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
    GATED: tl.constexpr, GELU: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (block of O): out[:, o] for all ROWS rows. NORM needs BLOCK_K >= D.

    The next piece of the weights is loaded before the present one is used.
    """
    if PDL:
        cuda.gdc_launch_dependents()
    block = tl.program_id(0)
    o = block * BLOCK_O + tl.arange(0, BLOCK_O)
    k = tl.arange(0, BLOCK_K)
    keep_o = o < num_out
    own = weight + tl.minimum(o, num_out - 1).to(tl.int64)[:, None] * D + k[None, :]
    STEPS: tl.constexpr = (D + BLOCK_K - 1) // BLOCK_K
    gate_MK = tl.load(own, mask=k[None, :] < D, other=0.0)
    up_MK = gate_MK
    if GATED:
        up_MK = tl.load(own + num_out.to(tl.int64) * D, mask=k[None, :] < D, other=0.0)
    if PDL:
        cuda.gdc_wait()
    sums = ()
    up_sums = ()
    for _ in tl.static_range(ROWS):
        sums += (tl.zeros((BLOCK_O, BLOCK_K // PIECE), tl.float32),)
        up_sums += (tl.zeros((BLOCK_O, BLOCK_K // PIECE), tl.float32),)
    for step in tl.static_range(STEPS):
        next_gate = gate_MK
        next_up = up_MK
        if step + 1 < STEPS:
            start = (step + 1) * BLOCK_K
            next_gate = tl.load(own + start, mask=k[None, :] + start < D, other=0.0)
            if GATED:
                next_up = tl.load(
                    own + num_out.to(tl.int64) * D + start, mask=k[None, :] + start < D, other=0.0
                )
        gate = gate_MK.to(tl.float32)
        up = up_MK.to(tl.float32)
        new_sums = ()
        new_up_sums = ()
        for row in tl.static_range(ROWS):
            if NORM:
                piece = norm_of_sum(
                    x, residual, total, norm_weight, eps, weight_offset, row, k, D, block == 0
                )
            else:
                piece = tl.load(x + row * D + step * BLOCK_K + k, mask=k + step * BLOCK_K < D, other=0.0)
            x_1K = piece.to(tl.float32)[None, :]
            part = tl.sum(tl.reshape(gate * x_1K, (BLOCK_O, BLOCK_K // PIECE, PIECE)), 2)
            new_sums += (sums[row] + part,)
            if GATED:
                part = tl.sum(tl.reshape(up * x_1K, (BLOCK_O, BLOCK_K // PIECE, PIECE)), 2)
                new_up_sums += (up_sums[row] + part,)
            else:
                new_up_sums += (up_sums[row],)
        sums = new_sums
        up_sums = new_up_sums
        gate_MK = next_gate
        up_MK = next_up
    for row in tl.static_range(ROWS):
        result = tl.sum(sums[row], 1)
        if BIAS:
            result += tl.load(bias + o, mask=keep_o, other=0.0).to(tl.float32)
        if GATED:
            up_result = tl.sum(up_sums[row], 1)
            if BIAS:
                up_result += tl.load(bias + num_out + o, mask=keep_o, other=0.0).to(tl.float32)
            result = activate(result, up_result, GELU)
        tl.store(out + row * num_out.to(tl.int64) + o, result.to(out.dtype.element_ty), mask=keep_o)


@triton.jit
def prefetch_lines(own, D: tl.constexpr, COLUMNS: tl.constexpr):
    """Ask for the first COLUMNS (a power of two) columns of some rows, so that they come to the L2 cache."""
    line = tl.minimum(tl.arange(0, (COLUMNS + LINE - 1) // LINE) * LINE, D - 1)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; // $0",
        "=r,l",
        [(own[:, None] + line[None, :]).to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def store_tile(
    out, bias, acc, up_acc, m, o, M, num_out, GATED: tl.constexpr, GELU: tl.constexpr, BIAS: tl.constexpr
):  # fmt: skip
    """Epilogue over a tile [m, o]: bias, gate, rounding."""
    keep_o = o[None, :] < num_out
    if BIAS:
        acc += tl.load(bias + o[None, :], mask=keep_o, other=0.0).to(tl.float32)
    if GATED:
        if BIAS:
            up_acc += tl.load(bias + num_out + o[None, :], mask=keep_o, other=0.0).to(tl.float32)
        acc = activate(acc, up_acc, GELU)
    address = out + m.to(tl.int64)[:, None] * num_out + o[None, :]
    tl.store(address, acc.to(out.dtype.element_ty), mask=(m[:, None] < M) & keep_o)


@triton.jit(do_not_specialize=["M"])
def grouped_linear_kernel(
    out, x, weight, bias, M, num_out,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr, GROUPS: tl.constexpr,
    STAGES: tl.constexpr, PREFETCH: tl.constexpr,
    GATED: tl.constexpr, GELU: tl.constexpr, BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (block of O, block of M): GROUPS products over interleaved pieces of D, added in order.

    A batched `tl.dot` gives each warp its own groups, so the sum over D is split inside a program.
    """
    if PDL:
        cuda.gdc_launch_dependents()
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = weight + tl.minimum(o, num_out - 1).to(tl.int64) * D
    up_offset = num_out.to(tl.int64) * D
    if PDL:
        prefetch_lines(row, D, PREFETCH)
        if GATED:
            prefetch_lines(row + up_offset, D, PREFETCH)
        cuda.gdc_wait()
    group = (tl.arange(0, GROUPS) * BLOCK_K)[:, None, None]
    k_GK = group + tl.arange(0, BLOCK_K)[None, None, :]
    own = row[None, :, None] + k_GK
    x_rows = x + m.to(tl.int64)[None, :, None] * D + k_GK
    keep_m = m[None, :, None] < M
    acc = tl.zeros((GROUPS, BLOCK_M, BLOCK_O), tl.float32)
    up_acc = tl.zeros((GROUPS, BLOCK_M, BLOCK_O), tl.float32)
    for start in tl.range(0, D, GROUPS * BLOCK_K, num_stages=STAGES):
        if D % (GROUPS * BLOCK_K) == 0:
            w_GOK = tl.load(own + start)
            x_GMK = tl.load(x_rows + start, mask=keep_m, other=0.0)
        else:
            w_GOK = tl.load(own + start, mask=k_GK + start < D, other=0.0)
            x_GMK = tl.load(x_rows + start, mask=keep_m & (k_GK + start < D), other=0.0)
        acc = tl.dot(x_GMK, tl.permute(w_GOK, (0, 2, 1)), acc, input_precision="ieee")
        if GATED:
            if D % (GROUPS * BLOCK_K) == 0:
                up_GOK = tl.load(own + up_offset + start)
            else:
                up_GOK = tl.load(own + up_offset + start, mask=k_GK + start < D, other=0.0)
            up_acc = tl.dot(x_GMK, tl.permute(up_GOK, (0, 2, 1)), up_acc, input_precision="ieee")
    store_tile(out, bias, tl.sum(acc, 0), tl.sum(up_acc, 0), m, o, M, num_out, GATED, GELU, BIAS)


@triton.jit(do_not_specialize=["M"])
def tiled_linear_kernel(
    out, x, weight, bias, M, num_out,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    PREFETCH: tl.constexpr, GATED: tl.constexpr, GELU: tl.constexpr, BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (tile of M and O): one accumulator over D in ascending order.

    Tiles are walked in columns of TILES_M, so that those in flight share weights and rows in the L2 cache.
    """
    if PDL:
        cuda.gdc_launch_dependents()
    num_m = tl.cdiv(M, BLOCK_M)
    num_o = tl.cdiv(num_out, BLOCK_O)
    program = tl.program_id(0)
    first_m = program // (TILES_M * num_o) * TILES_M
    height = tl.minimum(num_m - first_m, TILES_M)
    within = program % (TILES_M * num_o)
    m = (first_m + within % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    o = within // height * BLOCK_O + tl.arange(0, BLOCK_O)
    row = weight + tl.minimum(o, num_out - 1).to(tl.int64) * D
    up_offset = num_out.to(tl.int64) * D
    if PDL:
        prefetch_lines(row, D, PREFETCH)
        if GATED:
            prefetch_lines(row + up_offset, D, PREFETCH)
        cuda.gdc_wait()
    k = tl.arange(0, BLOCK_K)[None, :]
    own = row[:, None] + k
    x_rows = x + m.to(tl.int64)[:, None] * D + k
    keep_m = m[:, None] < M
    acc = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
    up_acc = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
    for start in tl.range(0, D, BLOCK_K, num_stages=STAGES):
        if D % BLOCK_K == 0:
            w_OK = tl.load(own + start)
            x_MK = tl.load(x_rows + start, mask=keep_m, other=0.0)
        else:
            w_OK = tl.load(own + start, mask=k + start < D, other=0.0)
            x_MK = tl.load(x_rows + start, mask=keep_m & (k + start < D), other=0.0)
        acc = tl.dot(x_MK, tl.trans(w_OK), acc, input_precision="ieee")
        if GATED:
            if D % BLOCK_K == 0:
                up_OK = tl.load(own + up_offset + start)
            else:
                up_OK = tl.load(own + up_offset + start, mask=k + start < D, other=0.0)
            up_acc = tl.dot(x_MK, tl.trans(up_OK), up_acc, input_precision="ieee")
    store_tile(out, bias, acc, up_acc, m, o, M, num_out, GATED, GELU, BIAS)
