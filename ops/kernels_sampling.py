"""Triton bodies of `sample_rows`, which `triton_sampling.py` launches: scan, restrict, finish.

scan cuts each line's vocabulary into parts, one program each, and leaves the best token of every part. restrict
draws for the rows with top-k, top-p or min-p; finish takes the best of the parts, decides how the row ends and
advances it. Nothing is shared between lines, and no order of additions depends on their number.

All are launched without fused multiply-add, so that a score is the same number wherever it is computed. Table and
column numbers are those of `sample_rows.py`.
"""

# ruff: noqa: SIM102 (nested, so that what the compiler knows stays apart from what the device finds)

import triton
import triton.language as tl

from tercet.ops.sample_rows import (
    FINISH_ERROR,
    FINISH_LENGTH,
    FINISH_NONE,
    RealColumn,
    RowFeature,
    WholeColumn,
)
from tercet.ops.sampling import UNBOUNDED

INFINITY = tl.constexpr(float("inf"))
NO_TOKEN = tl.constexpr(UNBOUNDED)
LOWEST_KEY = tl.constexpr(-(1 << 31))
LEAST_KEYS_APART = tl.constexpr(1 << 11)  # a cut of the groups need not be exact
MORE_THAN_ROUNDING = tl.constexpr(1.0 + 1e-5)

MULTIPLIER_1 = tl.constexpr(0x7FEB352D)  # as in noise.py
MULTIPLIER_2 = tl.constexpr(0x846CA68B)
POSITION_MULTIPLIER_LOW = tl.constexpr(0x9E3779B9)
POSITION_MULTIPLIER_HIGH = tl.constexpr(0x85EBCA77)
TO_UNIT = tl.constexpr((1.0 - 2.0**-24) * 2.0**-31)
NEAR_ZERO = tl.constexpr(2.0**-6)

NONE = tl.constexpr(FINISH_NONE)
LENGTH = tl.constexpr(FINISH_LENGTH)
ERROR = tl.constexpr(FINISH_ERROR)
NOT_FINISHED = tl.constexpr(255)

RANDOM = tl.constexpr(int(RowFeature.RANDOM))
RESTRICTED = tl.constexpr(int(RowFeature.RESTRICTED))
STOP = tl.constexpr(int(RowFeature.STOP))
MIN_TOKENS = tl.constexpr(int(RowFeature.MIN_TOKENS))
ALLOWED = tl.constexpr(int(RowFeature.ALLOWED))
BIAS = tl.constexpr(int(RowFeature.BIAS))
PENALTIES = tl.constexpr(int(RowFeature.PENALTIES))
BAD_WORDS = tl.constexpr(int(RowFeature.BAD_WORDS))

REALS = tl.constexpr(len(RealColumn))
INV_TEMPERATURE = tl.constexpr(int(RealColumn.INV_TEMPERATURE))
TOP_P = tl.constexpr(int(RealColumn.TOP_P))
MIN_P = tl.constexpr(int(RealColumn.MIN_P))
REPETITION = tl.constexpr(int(RealColumn.REPETITION))
FREQUENCY = tl.constexpr(int(RealColumn.FREQUENCY))
PRESENCE = tl.constexpr(int(RealColumn.PRESENCE))

WHOLES = tl.constexpr(len(WholeColumn))
SEED_LOW = tl.constexpr(int(WholeColumn.SEED_LOW))
SEED_HIGH = tl.constexpr(int(WholeColumn.SEED_HIGH))
TOP_K = tl.constexpr(int(WholeColumn.TOP_K))
PROMPT_LEN = tl.constexpr(int(WholeColumn.PROMPT_LEN))
LEAST_TOKENS = tl.constexpr(int(WholeColumn.MIN_TOKENS))
MOST_TOKENS = tl.constexpr(int(WholeColumn.MAX_TOKENS))
FEATURES = tl.constexpr(int(WholeColumn.FEATURES))


# ---------------------------------------------------------------------------------------------- noise


@triton.jit
def _mix(x):
    """lowbias32 of uint32 words."""
    x = (x ^ (x >> 16)) * MULTIPLIER_1
    x = (x ^ (x >> 15)) * MULTIPLIER_2
    return x ^ (x >> 16)


@triton.jit
def _noise_keys(whole, position):
    """The two key words of a row's draw; `whole` is its line of integers."""
    low = tl.load(whole + SEED_LOW).to(tl.uint32)
    high = tl.load(whole + SEED_HIGH).to(tl.uint32)
    place = position.to(tl.uint32)
    first = _mix(low + place * POSITION_MULTIPLIER_LOW) ^ high
    second = _mix(high + place * POSITION_MULTIPLIER_HIGH) ^ low
    return _mix(first), _mix(second)


@triton.jit
def _log_exponential(ids, first, second):
    """Logarithm of the exponential noise of tokens, as `noise.log_exponential`."""
    bits = ids.to(tl.uint32) ^ first
    bits = (bits ^ (bits >> 16)) * MULTIPLIER_1
    bits = ((bits ^ (bits >> 15)) + second) * MULTIPLIER_2
    bits = (bits ^ (bits >> 16)) & 0x7FFFFFFF
    v = (bits.to(tl.int32).to(tl.float32) + 0.5) * TO_UNIT
    # -log(1 - v): a series near 0, elsewhere the logarithm and what the rounding of 1 - v lost (no division)
    u = 1.0 - v
    series = v * (1.0 + v * (0.5 + v * (1.0 / 3.0 + v * 0.25)))
    return tl.log(tl.where(v < NEAR_ZERO, series, (v - (1.0 - u)) - tl.log(u)))


# ---------------------------------------------------------------------------------------- logits of a row


@triton.jit
def _tanh(x):
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def _mask_completed_words(x, ids, low, high, words, num_words, word_len, tokens, prompt_len, length):
    """-inf for tokens in [low, high) that would complete one of a row's words."""
    n = 0
    token = tl.load(words)
    while token >= 0:
        if (token >= low) & (token < high):
            word = words + n * word_len
            matches = 1
            for back in range(1, word_len):
                wanted = tl.load(word + back)
                place = length - back
                known = tl.load(tokens + place, mask=place >= prompt_len, other=-2)
                matches = tl.where((wanted >= 0) & (wanted != known), 0, matches)
            x = tl.where((ids == token) & (matches > 0), x - INFINITY, x)
        n += 1
        token = tl.load(words + n * word_len, mask=n < num_words, other=-1)
    return x


@triton.jit
def _edit(
    x, ids, keep, low, high, row, length, features, reals, wholes, stop_ids, num_stop, allowed_bits, num_bytes,
    bias_ids, bias_values, num_bias, bad_words, num_words, word_len, seen, tokens, V: tl.constexpr,
):  # fmt: skip
    """A row's logits of some tokens, all of them in [low, high), after every stage before the draw."""
    real, whole = reals + row * REALS, wholes + row * WHOLES
    prompt_len = tl.load(whole + PROMPT_LEN)
    if features & ALLOWED != 0:
        byte = tl.load(allowed_bits + row * num_bytes + ids // 8, mask=keep, other=0).to(tl.int32)
        x = tl.where((byte >> (ids % 8)) & 1 != 0, x, -INFINITY)
    if features & BIAS != 0:
        k = 0
        token = tl.load(bias_ids + row * num_bias)
        while token >= 0:
            if (token >= low) & (token < high):
                x = tl.where(ids == token, x + tl.load(bias_values + row * num_bias + k), x)
            k += 1
            token = tl.load(bias_ids + row * num_bias + k, mask=k < num_bias, other=-1)
    if features & MIN_TOKENS != 0:
        if length - prompt_len < tl.load(whole + LEAST_TOKENS):
            k = 0
            token = tl.load(stop_ids + row * num_stop)
            while token >= 0:
                x = tl.where(ids == token, x - INFINITY, x)
                k += 1
                token = tl.load(stop_ids + row * num_stop + k, mask=k < num_stop, other=-1)
    if features & PENALTIES != 0:
        count = tl.load(seen + row * V + ids, mask=keep, other=0)
        repetition = tl.load(real + REPETITION)
        inverse = 1.0 / repetition
        sign = tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))
        factor = sign * ((inverse - repetition) / 2) + ((inverse + repetition) / 2 - 1)
        x = x * (factor * tl.where(count > 0, 1.0, 0.0) + 1.0)
        times = (count >> 1).to(tl.float32)
        x = x - times * tl.load(real + FREQUENCY)
        x = x - tl.where(times > 0, 1.0, 0.0) * tl.load(real + PRESENCE)
    if features & BAD_WORDS != 0:
        words = bad_words + row * (num_words * word_len)
        x = _mask_completed_words(
            x, ids, low, high, words, num_words, word_len, tokens, prompt_len, length
        )  # fmt: skip
    return x


@triton.jit
def _sort_key(x):
    """int32 in the order of the floats, +0 and -0 alike."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x == 0, 0, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits))


@triton.jit
def _of_sort_key(key):
    bits = tl.where(key < 0, key ^ 0x7FFFFFFF, key)
    return bits.to(tl.float32, bitcast=True)


# --------------------------------------------------------------------------------------------- scan


@triton.jit(do_not_specialize=["num_stop", "num_bytes", "num_bias", "num_words", "word_len"])
def scan_kernel(
    part_score, part_token, part_logit, part_top, part_sum, group_top, logits, logits_stride, rows, lengths, finished,
    reals, wholes, stop_ids, num_stop, allowed_bits, num_bytes, bias_ids, bias_values, num_bias,
    bad_words, num_words, word_len, seen, tokens, tokens_stride, soft_cap,
    V: tl.constexpr, PARTS: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
    DRAW: tl.constexpr, FULL: tl.constexpr, SOFT_CAP: tl.constexpr,
):  # fmt: skip
    """Program (part, line): best score of the part (+inf if a logit is NaN or +inf) and its lowest token.

    Of restricted rows also: that token's logit, the greatest logit, the sum of weights relative to it, and the
    greatest logit of each GROUP of tokens.
    """
    part, line = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = tl.load(rows + line).to(tl.int64)
    if row < 0:
        return
    if tl.load(finished + row) != 0:
        return
    length = tl.load(lengths + row)
    whole = wholes + row * WHOLES
    features = tl.load(whole + FEATURES)
    low = part * BLOCK
    ids = low + tl.arange(0, BLOCK)
    keep = ids < V
    x = tl.load(logits + line * logits_stride + ids, mask=keep, other=-INFINITY).to(tl.float32)
    if SOFT_CAP:
        x = tl.where(keep, _tanh(x / soft_cap) * soft_cap, -INFINITY)
    if FULL:
        x = _edit(
            x, ids, keep, low, low + BLOCK, row, length, features, reals, wholes, stop_ids, num_stop,
            allowed_bits, num_bytes, bias_ids, bias_values, num_bias, bad_words, num_words, word_len,
            seen, tokens + row * tokens_stride, V,
        )  # fmt: skip
    is_broken = (x != x) | (x == INFINITY)
    any_broken = tl.max(is_broken.to(tl.int32), 0)
    x = tl.where(is_broken, -INFINITY, x)
    score = x
    inv_temperature = tl.load(reals + row * REALS + INV_TEMPERATURE)
    if DRAW:
        if features & RANDOM != 0:
            first, second = _noise_keys(whole, length - tl.load(whole + PROMPT_LEN))
            score = x * inv_temperature - _log_exponential(ids, first, second)
    best = tl.max(score, 0)
    token = tl.min(tl.where(score == best, ids, NO_TOKEN), 0)
    place = line * PARTS + part
    tl.store(part_score + place, tl.where(any_broken > 0, INFINITY, best))
    tl.store(part_token + place, token)
    if FULL:
        if features & RESTRICTED != 0:
            top = tl.max(x, 0)
            against = tl.where(top == -INFINITY, 0.0, top) * inv_temperature
            tl.store(part_logit + place, tl.max(tl.where(ids == token, x, -INFINITY), 0))
            tl.store(part_top + place, top)
            tl.store(part_sum + place, tl.sum(tl.exp(x * inv_temperature - against), 0))
            group = part * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
            tops = tl.max(tl.reshape(x, [BLOCK // GROUP, GROUP]), 1)
            tl.store(group_top + line * GROUPS + group, tops, mask=group < GROUPS)


@triton.jit
def _best_part(part_score, part_token, line, PARTS: tl.constexpr, PARTS_PAD: tl.constexpr):
    """Best score of a line and its lowest token."""
    p = tl.arange(0, PARTS_PAD)
    score = tl.load(part_score + line * PARTS + p, mask=p < PARTS, other=-INFINITY)
    token = tl.load(part_token + line * PARTS + p, mask=p < PARTS, other=NO_TOKEN)
    best = tl.max(score, 0)
    return best, tl.min(tl.where(score == best, token, NO_TOKEN), 0)


# ------------------------------------------------------------------------------------------- restrict


@triton.jit
def _cut_groups(keys, weights, key_top, top_k, least_weight, by_weight):
    """A sort key at or above which every kept token lies, as high as is cheaply found.

    Of the groups whose top is at or above it there are top_k, or (with by_weight) their tops alone weigh
    least_weight: so the tokens above it are enough, whatever else is in the groups.
    """
    low = tl.full([], LOWEST_KEY, tl.int64)
    high = key_top.to(tl.int64) + 1
    while high - low > LEAST_KEYS_APART:
        middle = low + (high - low) // 2
        above = keys >= middle.to(tl.int32)
        is_enough = tl.sum(above.to(tl.int32), 0) >= top_k
        weight = tl.sum(tl.where(above, weights, 0.0), 0)
        is_enough = is_enough | (by_weight & (weight >= least_weight))
        low = tl.where(is_enough, middle, low)
        high = tl.where(is_enough, high, middle)
    return low.to(tl.int32)


@triton.jit
def _list_groups(group_list, keep, GROUPS_PAD: tl.constexpr):
    """Write the numbers of the groups to keep, in order; returns how many there are."""
    group = tl.arange(0, GROUPS_PAD)
    flag = keep.to(tl.int32)
    tl.store(group_list + tl.cumsum(flag, 0) - 1, group, mask=keep)
    tl.debug_barrier()  # the list is read by other threads than wrote it
    return tl.sum(flag, 0)


@triton.jit
def _listed_tokens(
    group_list, num_listed, start, logits_line, row, length, features, reals, wholes, stop_ids, num_stop,
    allowed_bits, num_bytes, bias_ids, bias_values, num_bias, bad_words, num_words, word_len, seen,
    tokens, soft_cap, V: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr, SOFT_CAP: tl.constexpr,
):  # fmt: skip
    """Ids and edited logits of a tile of the listed groups' tokens; -inf past the end."""
    t = start + tl.arange(0, TILE)
    is_listed = t < num_listed * GROUP
    ids = tl.load(group_list + t // GROUP, mask=is_listed, other=0) * GROUP + t % GROUP
    keep = is_listed & (ids < V)
    x = tl.load(logits_line + ids, mask=keep, other=-INFINITY).to(tl.float32)
    if SOFT_CAP:
        x = _tanh(x / soft_cap) * soft_cap
    x = _edit(
        x, ids, keep, 0, V, row, length, features, reals, wholes, stop_ids, num_stop, allowed_bits, num_bytes,
        bias_ids, bias_values, num_bias, bad_words, num_words, word_len, seen, tokens, V,
    )  # fmt: skip
    return ids, tl.where(keep, x, -INFINITY)


@triton.jit(do_not_specialize=["num_stop", "num_bytes", "num_bias", "num_words", "word_len"])
def restrict_kernel(
    drawn, group_list, part_score, part_token, part_logit, part_top, part_sum, group_top,
    logits, logits_stride, rows, lengths, finished, reals, wholes, stop_ids, num_stop, allowed_bits, num_bytes,
    bias_ids, bias_values, num_bias, bad_words, num_words, word_len, seen, tokens, tokens_stride, soft_cap,
    V: tl.constexpr, PARTS: tl.constexpr, PARTS_PAD: tl.constexpr, GROUPS: tl.constexpr,
    GROUPS_PAD: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr, SOFT_CAP: tl.constexpr,
):  # fmt: skip
    """Program (line): the draw of a restricted row, by rejection.

    The kept tokens are a prefix of the order (logit descending, id ascending). The best-scored token of a longer
    prefix is the draw if it is kept, which the count and the weight of the tokens before it tell; if not, the
    tokens before it are the next prefix. The first candidate is the best of the whole vocabulary. Only groups
    whose greatest logit is high enough are visited.
    """
    line = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + line).to(tl.int64)
    if row < 0:
        return
    if tl.load(finished + row) != 0:
        return
    whole, real = wholes + row * WHOLES, reals + row * REALS
    features = tl.load(whole + FEATURES)
    if features & RESTRICTED == 0:
        return
    best_score, token = _best_part(part_score, part_token, line, PARTS, PARTS_PAD)
    if (best_score == INFINITY) | (best_score == -INFINITY):
        return
    p = tl.arange(0, PARTS_PAD)
    part_tops = tl.load(part_top + line * PARTS + p, mask=p < PARTS, other=-INFINITY)
    sums = tl.load(part_sum + line * PARTS + p, mask=p < PARTS, other=0.0)
    part_tokens = tl.load(part_token + line * PARTS + p, mask=p < PARTS, other=NO_TOKEN)
    part_logits = tl.load(part_logit + line * PARTS + p, mask=part_tokens == token, other=-INFINITY)
    logit = tl.max(part_logits, 0)
    length = tl.load(lengths + row)
    inv_temperature = tl.load(real + INV_TEMPERATURE)
    top_k, top_p, min_p = tl.load(whole + TOP_K), tl.load(real + TOP_P), tl.load(real + MIN_P)
    top = tl.max(part_tops, 0)
    scaled_top = top * inv_temperature
    key_top = _sort_key(top)
    shares = tl.exp(part_tops * inv_temperature - scaled_top)
    total = tl.sum(
        (sums * shares).to(tl.float64), 0
    )  # weight that top_p is a share of: at first of everything
    # Unless all tokens count for `total`, its own prefix must be among the groups.
    by_weight = (top_p < 1) & (top_k == NO_TOKEN) & (min_p == 0)

    g = tl.arange(0, GROUPS_PAD)
    tops = tl.load(group_top + line * GROUPS + g, mask=g < GROUPS, other=-INFINITY)
    keys = _sort_key(tops)
    weights = tl.exp(tops * inv_temperature - scaled_top)
    weights = tl.where((weights >= min_p) & (weights > 0), weights, 0.0)
    least_weight = (total * top_p).to(tl.float32) * MORE_THAN_ROUNDING
    cut = _cut_groups(keys, weights, key_top, top_k, least_weight, by_weight)
    group_list += line * GROUPS
    num_listed = _list_groups(group_list, (keys >= cut) & (weights > 0), GROUPS_PAD)
    num_tokens = num_listed * GROUP
    logits += line * logits_stride
    tokens += row * tokens_stride

    if (top_p < 1) & (by_weight == 0):
        # The weight of the first min(top_k, all) tokens: search the sort key of the last of them.
        low, high = cut.to(tl.int64), key_top.to(tl.int64) + 1
        count_high = 0
        weight_high = tl.zeros([], tl.float64)
        middle = low
        is_searching = 1
        while is_searching > 0:
            count = 0
            weight = tl.zeros([], tl.float64)
            for start in range(0, num_tokens, TILE):
                ids, x = _listed_tokens(
                    group_list, num_listed, start, logits, row, length, features, reals, wholes, stop_ids, num_stop,
                    allowed_bits, num_bytes, bias_ids, bias_values, num_bias, bad_words, num_words, word_len,
                    seen, tokens, soft_cap, V, GROUP, TILE, SOFT_CAP,
                )  # fmt: skip
                w = tl.exp(x * inv_temperature - scaled_top)
                is_above = (w >= min_p) & (w > 0) & (_sort_key(x) >= middle.to(tl.int32))
                count += tl.sum(is_above.to(tl.int32), 0)
                weight += tl.sum(tl.where(is_above, w, 0.0).to(tl.float64), 0)
            is_first = middle == cut
            if (count == top_k) | (is_first & (count < top_k)):
                total = weight
                is_searching = 0
            else:
                if count > top_k:
                    low = middle
                else:
                    high = middle
                    count_high = count
                    weight_high = weight
                middle = low + (high - low) // 2
                if high - low <= 1:  # several tokens share the last logit
                    last_weight = tl.exp(_of_sort_key(low.to(tl.int32)) * inv_temperature - scaled_top)
                    total = weight_high + last_weight.to(tl.float64) * (top_k - count_high).to(tl.float64)
                    is_searching = 0

    # The first candidate may be below the cut, hence not kept: then begin with all tokens at or above it.
    first, second = _noise_keys(whole, length - tl.load(whole + PROMPT_LEN))
    own_weight = tl.exp(logit * inv_temperature - scaled_top)
    key = _sort_key(logit)
    is_candidate = (key >= cut) & (own_weight >= min_p) & (own_weight > 0)
    key = tl.where(is_candidate, key, cut)
    bound = tl.where(is_candidate, token, NO_TOKEN)
    most_weight = total * top_p
    is_searching = 1
    while is_searching > 0:
        count = 0
        weight = tl.zeros([], tl.float64)
        best = tl.full([], -INFINITY, tl.float32)
        next_key = key
        next_token = bound
        for start in range(0, num_tokens, TILE):
            ids, x = _listed_tokens(
                group_list, num_listed, start, logits, row, length, features, reals, wholes, stop_ids, num_stop,
                allowed_bits, num_bytes, bias_ids, bias_values, num_bias, bad_words, num_words, word_len,
                seen, tokens, soft_cap, V, GROUP, TILE, SOFT_CAP,
            )  # fmt: skip
            scaled = x * inv_temperature
            w = tl.exp(scaled - scaled_top)
            keys_t = _sort_key(x)
            before = (keys_t > key) | ((keys_t == key) & (ids < bound))
            before = before & (w >= min_p) & (w > 0)
            count += tl.sum(before.to(tl.int32), 0)
            weight += tl.sum(tl.where(before, w, 0.0).to(tl.float64), 0)
            score = tl.where(before, scaled - _log_exponential(ids, first, second), -INFINITY)
            tile_best = tl.max(score, 0)
            tile_token = tl.min(tl.where(score == tile_best, ids, NO_TOKEN), 0)
            # Groups are listed in order, so an earlier tile has the lower ids.
            is_better = tile_best > best
            tile_key = tl.max(tl.where(ids == tile_token, keys_t, LOWEST_KEY), 0)
            best = tl.where(is_better, tile_best, best)
            next_key = tl.where(is_better, tile_key, next_key)
            next_token = tl.where(is_better, tile_token, next_token)
        is_within = (count < top_k) & ((top_p >= 1) | (weight < most_weight))
        if (count == 0) | ((bound != NO_TOKEN) & is_within):
            is_searching = 0
        else:
            key = next_key
            bound = next_token
    tl.store(drawn + line, bound)


# --------------------------------------------------------------------------------------------- finish


@triton.jit(do_not_specialize=["num_stop", "out_stride"])
def finish_kernel(
    out, out_stride, drawn, part_score, part_token, rows, tokens, tokens_stride, lengths, finished, wholes,
    stop_ids, stop_finish, num_stop, seen, max_model_len,
    V: tl.constexpr, PARTS: tl.constexpr, PARTS_PAD: tl.constexpr, STOP_TILE: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Program (line): the token, how the row ends with it, and the row's state after it."""
    line = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + line).to(tl.int64)
    is_live = row >= 0
    if is_live:
        is_live = tl.load(finished + row) == 0
    if is_live == 0:
        tl.store(out + line, 0)
        tl.store(out + out_stride + line, NONE)
        tl.store(out + 2 * out_stride + line, 0)
        return
    whole = wholes + row * WHOLES
    features = tl.load(whole + FEATURES)
    length = tl.load(lengths + row)
    best, token = _best_part(part_score, part_token, line, PARTS, PARTS_PAD)
    is_broken = (best == INFINITY) | (best == -INFINITY)
    if FULL:
        if (features & RESTRICTED != 0) & (is_broken == 0):
            token = tl.load(drawn + line)
            is_broken = token >= V  # the best logit over the temperature is not finite
    token = tl.where(is_broken, 0, token)
    code = NOT_FINISHED
    is_full = length + 1 - tl.load(whole + PROMPT_LEN) >= tl.load(whole + MOST_TOKENS)
    code = tl.where(is_full | (length + 1 >= max_model_len), LENGTH, code)
    if features & STOP != 0:
        for start in range(0, num_stop, STOP_TILE):
            k = start + tl.arange(0, STOP_TILE)
            is_hit = tl.load(stop_ids + row * num_stop + k, mask=k < num_stop, other=-1) == token
            codes = tl.load(stop_finish + row * num_stop + k, mask=is_hit, other=NOT_FINISHED).to(tl.int32)
            code = tl.minimum(code, tl.min(codes, 0))
    code = tl.where(code == NOT_FINISHED, NONE, code)
    code = tl.where(is_broken, ERROR, code)
    tl.store(out + line, token)
    tl.store(out + out_stride + line, code)
    tl.store(out + 2 * out_stride + line, is_broken.to(tl.int32))
    tl.store(tokens + row * tokens_stride + length, token, mask=length < tokens_stride)
    tl.store(lengths + row, length + 1)
    tl.store(finished + row, (code != NONE).to(finished.dtype.element_ty))
    if FULL:
        if (features & PENALTIES != 0) & (is_broken == 0):
            times = seen + row * V + token
            tl.store(times, tl.load(times) + 2)
