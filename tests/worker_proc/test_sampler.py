"""The sampler over whole batches: every stage against the definition, and what must not matter to a row."""

import sys
from collections.abc import Callable
from types import FrameType

import numpy as np
import pytest
import torch

from tercet.errors import ValidationError
from tercet.ipc.messages import Finish, Sampling
from tercet.worker_proc.sampler import Sampler, SampleResult
from tercet.worker_proc.sampling_state import MAX_BAD_WORD_TOKENS, SamplingState
from tests.ops import sampling_reference as reference
from tests.ops.sampling_reference import Row

CPU = torch.device("cpu")
VOCAB = 203
MAX_LEN = 64
EOS = 2


def to_sampling(row: Row, **other: object) -> Sampling:
    fields: dict[str, object] = {
        "max_tokens": 1000,
        "temperature": row.temperature,
        "top_k": row.top_k,
        "top_p": row.top_p,
        "min_p": row.min_p,
        "repetition_penalty": row.repetition,
        "frequency_penalty": row.frequency,
        "presence_penalty": row.presence,
        "min_tokens": row.min_tokens,
        "eos_token_ids": [token for token in row.stop if token == EOS],
        "stop_token_ids": [token for token in row.stop if token != EOS],
        "bad_words": [list(word) for word in row.bad_words],
    }
    if row.bias:
        fields["logit_bias_ids"] = np.array(list(row.bias), dtype=np.int32)
        fields["logit_bias_values"] = np.array(list(row.bias.values()), dtype=np.float32)
    if row.allowed is not None:
        fields["allowed_token_ids"] = np.array(row.allowed, dtype=np.int32)
    return Sampling(**{**fields, **other})  # type: ignore[arg-type]


class Bench:
    """A sampler with the runner's part: histories and lengths."""

    def __init__(
        self, num_rows: int = 32, vocab_size: int = VOCAB, max_len: int = MAX_LEN, device: torch.device = CPU
    ) -> None:
        self.device = device
        self.state = SamplingState(num_rows, vocab_size, max_len, device)
        self.sampler = Sampler(self.state)
        self.history = torch.zeros(num_rows, max_len, dtype=torch.int32, device=device)
        self.lengths = torch.zeros(num_rows, dtype=torch.int32, device=device)

    def admit(self, index: int, row: Row, **other: object) -> None:
        tokens = np.array(row.prompt + row.outputs, dtype=np.int32)
        self.state.admit(index, to_sampling(row, **other), row.seed, len(row.prompt), tokens)
        self.history[index, : len(tokens)] = torch.from_numpy(tokens).to(self.device)
        self.lengths[index] = len(tokens)

    def step(
        self, rows: list[int], logits: np.ndarray | torch.Tensor, frozen: list[bool] | None = None
    ) -> SampleResult:
        """Sample the rows and append their tokens, as the runner does."""
        batch = self.state.plan(np.array(rows, dtype=np.int32))
        scratch = torch.as_tensor(logits, device=self.device).clone()
        mask = None if frozen is None else torch.tensor(frozen, device=self.device)
        result = self.sampler(scratch, batch, self.history, self.lengths, mask)
        for i, row in enumerate(rows):
            if frozen is None or not frozen[i]:
                self.history[row, int(self.lengths[row])] = result.token_B[i]
                self.lengths[row] += 1
        return result


def random_row(rng: np.random.Generator, kind: str) -> Row:
    prompt = rng.integers(0, VOCAB, int(rng.integers(1, 9))).tolist()
    outputs = rng.integers(0, VOCAB, int(rng.integers(0, 12))).tolist()
    row = Row(prompt, outputs, seed=int(rng.integers(0, 2**63)) * 2)
    row.temperature = float(rng.choice([0.0, 0.7, 1.2]))
    if kind in ("full", "all"):
        row.top_k = int(rng.choice([0, 1, 5, 100]))
        row.top_p = float(rng.choice([1.0, 0.5, 0.9]))
        row.min_p = float(rng.choice([0.0, 0.05]))
    if kind in ("penalties", "all"):
        row.repetition = float(rng.choice([1.0, 1.5, 0.8]))
        row.frequency = float(rng.choice([0.0, 0.9, -0.6]))
        row.presence = float(rng.choice([0.0, 1.1, -0.4]))
    if kind in ("min_tokens", "all"):
        row.stop = (EOS, *rng.integers(3, VOCAB, 30).tolist())
        row.min_tokens = int(rng.choice([0, 4, 20]))
    if kind in ("bias", "all"):
        row.bias = {int(token): float(rng.normal(0, 6)) for token in rng.integers(0, VOCAB, 25)}
    if kind in ("allowed", "all") and rng.random() < 0.6:
        row.allowed = sorted({int(token) for token in rng.integers(3, VOCAB, 60)})
        if row.stop:
            row.allowed = sorted(set(row.allowed) - set(row.stop))
    if kind in ("bad_words", "all"):
        row.bad_words = [
            rng.integers(0, VOCAB, 1).tolist(),
            outputs[-2:] + rng.integers(0, VOCAB, 1).tolist(),
            [*prompt[-1:], *outputs, int(rng.integers(0, VOCAB))],
            *([int(token)] for token in rng.integers(0, VOCAB, 40)),
        ]
    return row


@pytest.mark.parametrize(
    "kind", ["plain", "full", "penalties", "min_tokens", "bias", "allowed", "bad_words", "all"]
)
def test_mixed_batches_draw_what_the_definition_says(kind: str) -> None:
    rng = np.random.default_rng(len(kind))
    for _ in range(4):
        rows = [random_row(rng, kind if i % 3 else "plain") for i in range(24)]
        bench = Bench()
        places = rng.permutation(32)[:24].tolist()
        for place, row in zip(places, rows, strict=True):
            bench.admit(place, row)
        logits = rng.normal(0, 2, (24, VOCAB)).astype(np.float32)
        result = bench.step(places, logits)
        wanted = [reference.draw(line, row) for line, row in zip(logits, rows, strict=True)]
        assert result.token_B.tolist() == wanted
        assert not result.bad_B.any()
        ends = [
            Finish.NONE
            if token not in row.stop or len(row.outputs) < row.min_tokens
            else (Finish.EOS if token == EOS else Finish.STOP_TOKEN)
            for token, row in zip(wanted, rows, strict=True)
        ]
        assert result.finish_B.tolist() == ends


def logits_of(rows: list[int], lengths: list[int], vocab_size: int = VOCAB) -> np.ndarray:
    """Logits that depend on the request and its length only, as a model's would."""
    return np.stack(
        [
            np.random.default_rng([row, length]).normal(0, 1.5, vocab_size)
            for row, length in zip(rows, lengths, strict=True)
        ]
    ).astype(np.float32)


def request(index: int) -> Row:
    """Requests of several kinds, the same for the same index."""
    row = random_row(np.random.default_rng(index), ("plain", "full", "penalties", "all")[index % 4])
    row.outputs, row.stop, row.min_tokens = [], (), 0
    return row


def generate(count: int, steps: int, order: Callable[[int], list[int]], shift: int) -> list[list[int]]:
    """Outputs of requests 0..count-1 placed `shift` rows on, in batches that `order(step)` names."""
    bench = Bench()
    requests = [request(i) for i in range(count)]
    for i, row in enumerate(requests):
        bench.admit((i + shift) % 32, row)
    outputs: list[list[int]] = [[] for _ in range(count)]
    step = 0
    while min(map(len, outputs)) < steps:
        members = [i for i in order(step) if len(outputs[i]) < steps]
        step += 1
        if members:
            lengths = [len(requests[i].prompt) + len(outputs[i]) for i in members]
            result = bench.step([(i + shift) % 32 for i in members], logits_of(members, lengths))
            for i, token in zip(members, result.token_B.tolist(), strict=True):
                outputs[i].append(token)
    return outputs


def test_tokens_do_not_depend_on_batch_row_or_step() -> None:
    whole = generate(12, 10, lambda step: list(range(12)), shift=0)
    alone = generate(12, 10, lambda step: [step % 12], shift=7)
    shuffled = generate(
        12, 10, lambda step: np.random.default_rng(step).permutation(12)[: 1 + step % 12].tolist(), shift=23
    )
    assert whole == alone == shuffled
    assert len({tuple(outputs) for outputs in whole}) == 12


def test_a_resumed_row_goes_on_as_if_it_had_lived_through() -> None:
    count, steps = 12, 12
    straight = generate(count, steps, lambda step: list(range(count)), shift=0)
    for cut in (1, 5, 11):
        bench = Bench()
        rows = []
        for i in range(count):
            row = request(i)
            row.outputs = straight[i][:cut]
            bench.admit(31 - i, row)
            rows.append(row)
        for step in range(cut, steps):
            lengths = [len(row.prompt) + step for row in rows]
            result = bench.step([31 - i for i in range(count)], logits_of(list(range(count)), lengths))
            assert result.token_B.tolist() == [outputs[step] for outputs in straight]


def test_counts_after_a_resume_equal_counts_lived_through() -> None:
    lived, resumed = Bench(), Bench()
    row = Row([5, 5, 6], seed=9, repetition=1.2, frequency=0.3)
    lived.admit(3, row)
    outputs = [int(lived.step([3], logits_of([0], [3 + i])).token_B[0]) for i in range(20)]
    resumed.admit(8, Row([5, 5, 6], outputs, seed=9, repetition=1.2, frequency=0.3))
    assert lived.state.seen is not None
    assert resumed.state.seen is not None
    assert torch.equal(lived.state.seen[3], resumed.state.seen[8])


def test_a_row_forgets_its_last_request() -> None:
    rng = np.random.default_rng(77)
    used = Bench()
    for place in range(8):
        used.admit(place, random_row(rng, "all"))
    used.step(list(range(8)), rng.normal(0, 1, (8, VOCAB)).astype(np.float32))
    for place in range(8):
        used.state.release(place)
    rows = [random_row(rng, ("plain", "penalties", "bad_words", "min_tokens")[i % 4]) for i in range(8)]
    # Shorter lists than before, and tokens that the last request was full of
    rows[0].stop = (EOS,)
    rows[1].stop, rows[1].frequency = (), 1.5
    fresh = Bench()
    for place, row in enumerate(rows):
        used.admit(place, row)
        fresh.admit(place, row)
    assert used.state.seen is not None
    assert fresh.state.seen is not None
    assert torch.equal(used.state.seen[1], fresh.state.seen[1])
    logits = rng.normal(0, 1, (8, VOCAB)).astype(np.float32)
    after, clean = used.step(list(range(8)), logits), fresh.step(list(range(8)), logits)
    assert after.token_B.tolist() == clean.token_B.tolist()
    assert after.finish_B.tolist() == clean.finish_B.tolist()


# --------------------------------------------------------------------------------------------------
# Ends


def step_to(bench: Bench, row: int, token: int) -> Finish:
    """Let a greedy row draw a given token."""
    logits = np.zeros((1, VOCAB), dtype=np.float32)
    logits[0, token] = 9
    return Finish(int(bench.step([row], logits).finish_B[0]))


def test_ends_are_told_apart() -> None:
    bench = Bench()
    bench.admit(0, Row([1], temperature=0.0), eos_token_ids=[2, 3], stop_token_ids=[3, 4])
    assert [step_to(bench, 0, token) for token in (5, 2, 3, 4, 0)] == [
        Finish.NONE,
        Finish.EOS,
        Finish.EOS,
        Finish.STOP_TOKEN,
        Finish.NONE,
    ]


def test_stop_ids_of_the_last_request_in_a_row_do_not_end_the_next() -> None:
    bench = Bench()
    bench.admit(0, Row([1], temperature=0.0), eos_token_ids=[2], stop_token_ids=[3, 4, 5, 6])
    bench.state.release(0)
    bench.admit(0, Row([1], temperature=0.0), stop_token_ids=[9])
    assert [step_to(bench, 0, token) for token in (2, 4, 6)] == [Finish.NONE] * 3
    assert step_to(bench, 0, 9) is Finish.STOP_TOKEN
    bench.admit(1, Row([1], temperature=0.0), stop_token_ids=[8])
    bench.state.release(0)
    bench.admit(0, Row([1], temperature=0.0))
    batch = bench.state.plan(np.array([0, 1]))
    logits = torch.zeros(2, VOCAB)
    logits[:, 9] = 1
    result = bench.sampler(logits, batch, bench.history, bench.lengths)
    assert result.finish_B.tolist() == [Finish.NONE, Finish.NONE]


def test_max_tokens_and_max_model_len_end_a_row_unless_it_stops() -> None:
    bench = Bench()
    bench.admit(0, Row([1, 1], temperature=0.0), max_tokens=2, eos_token_ids=[2])
    assert [step_to(bench, 0, 7), step_to(bench, 0, 7)] == [Finish.NONE, Finish.LENGTH]
    bench.admit(1, Row([1, 1], [7], temperature=0.0), max_tokens=2, eos_token_ids=[2])
    assert step_to(bench, 1, 2) is Finish.EOS
    bench.admit(2, Row([1] * (MAX_LEN - 2), temperature=0.0))
    assert [step_to(bench, 2, 7), step_to(bench, 2, 7)] == [Finish.NONE, Finish.LENGTH]


def test_min_tokens_holds_stop_ids_back() -> None:
    bench = Bench()
    bench.admit(0, Row([1], temperature=0.0, min_tokens=2, stop=(EOS, 9)))
    logits = np.zeros((1, VOCAB), dtype=np.float32)
    logits[0, [EOS, 9, 40]] = 9, 8, 7
    results = [bench.step([0], logits) for _ in range(3)]
    assert [int(result.token_B[0]) for result in results] == [40, 40, EOS]
    assert [int(result.finish_B[0]) for result in results] == [Finish.NONE, Finish.NONE, Finish.EOS]


def test_frozen_rows_change_nothing() -> None:
    bench = Bench()
    for place in range(4):
        bench.admit(place, Row([1], seed=place, frequency=0.5, stop=(EOS,)), max_tokens=1)
    assert bench.state.seen is not None
    before = bench.state.seen.clone()
    logits = logits_of([0, 1, 2, 3], [1, 1, 1, 1])
    logits[2] = np.nan
    result = bench.step([0, 1, 2, 3], logits, frozen=[True, False, True, False])
    assert result.finish_B.tolist() == [Finish.NONE, Finish.LENGTH, Finish.NONE, Finish.LENGTH]
    assert not result.bad_B.any()
    assert torch.equal(bench.state.seen[[0, 2]], before[[0, 2]])
    assert not torch.equal(bench.state.seen[[1, 3]], before[[1, 3]])


def test_a_broken_row_is_marked_and_the_others_go_on() -> None:
    for row in (Row([1], temperature=0.0), Row([1]), Row([1], top_p=0.9), Row([1], presence=0.2)):
        clean, broken = Bench(), Bench()
        for bench in (clean, broken):
            for place in range(6):
                bench.admit(place, Row(**{**vars(row), "seed": place}), logprobs=2)
        logits = logits_of(list(range(6)), [1] * 6)
        wanted = clean.step(list(range(6)), logits)
        logits[1], logits[3, 4], logits[4] = np.nan, np.inf, -np.inf
        result = broken.step(list(range(6)), logits)
        assert result.bad_B.tolist() == [False, True, False, True, True, False]
        assert result.finish_B.tolist() == [0, Finish.ERROR, 0, Finish.ERROR, Finish.ERROR, 0]
        assert result.token_B[[0, 2, 5]].tolist() == wanted.token_B[[0, 2, 5]].tolist()
        assert int(result.token_B.min()) >= 0
        assert int(result.token_B.max()) < VOCAB
        assert result.logprobs is not None
        assert wanted.logprobs is not None
        assert torch.equal(
            result.logprobs.columns.logprobs[[0, 2, 5]], wanted.logprobs.columns.logprobs[[0, 2, 5]]
        )


def test_a_row_with_every_token_masked_is_marked() -> None:
    bench = Bench()
    bench.admit(0, Row([1], allowed=[EOS], stop=(EOS,), min_tokens=3))
    assert bench.step([0], logits_of([0], [1])).bad_B.tolist() == [True]


# --------------------------------------------------------------------------------------------------
# Log-probabilities


@pytest.mark.parametrize("everyone", [True, False])
def test_logprobs_are_of_the_raw_logits_of_the_rows_that_ask(everyone: bool) -> None:
    bench = Bench()
    rng = np.random.default_rng(4)
    asks = {place: place % 4 for place in range(10) if everyone or place % 3 == 0}
    for place in range(10):
        bench.admit(place, random_row(rng, "all"), logprobs=asks.get(place))
    order = [9, 3, 4, 0, 1, 2, 5, 6, 7, 8]
    logits = rng.normal(0, 2, (10, VOCAB)).astype(np.float32)
    result = bench.step(order, logits)
    assert result.logprobs is not None
    wanting = [place for place in order if place in asks]
    k = max(asks.values())
    assert result.logprobs.rows.tolist() == wanting
    assert result.logprobs.position_b.tolist() == [order.index(place) for place in wanting]
    columns = result.logprobs.columns
    assert columns.token_ids.shape == (len(wanting), 1 + k)
    for i, place in enumerate(wanting):
        line = logits[order.index(place)].astype(np.float64)
        logprobs = line - np.log(np.exp(line).sum())
        chosen = int(result.token_B[order.index(place)])
        assert columns.token_ids[i].tolist() == [chosen, *np.argsort(-line)[:k]]
        assert columns.logprobs[i].tolist() == pytest.approx(logprobs[columns.token_ids[i]], abs=1e-5)
        assert columns.rank[i] == 1 + (line > line[chosen]).sum()


def test_all_tokens_may_be_asked_for() -> None:
    bench = Bench()
    bench.admit(0, Row([1]), logprobs=VOCAB)
    result = bench.step([0], logits_of([0], [1]))
    assert result.logprobs is not None
    assert sorted(result.logprobs.columns.token_ids[0, 1:].tolist()) == list(range(VOCAB))


# --------------------------------------------------------------------------------------------------
# Costs and misuse


def count_calls(function: Callable[[], object]) -> int:
    count = 0

    def profile(_frame: FrameType, event: str, _argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("kind", ["greedy", "plain", "full", "all"])
def test_calls_of_a_step_do_not_depend_on_the_batch(kind: str) -> None:
    counts = []
    for num_rows in (8, 256):
        bench = Bench(num_rows, vocab_size=1000)
        for place in range(num_rows):
            row = request(4 * (place % 8) + ("plain", "full", "-", "all", "greedy").index(kind) % 4)
            row.temperature = 0.0 if kind == "greedy" else 0.9
            if kind in ("full", "all"):
                row.top_k, row.top_p = 20 + place % 8, 0.9
            bench.admit(place, row, logprobs=3 if kind == "all" else None)
        batch = bench.state.plan(np.arange(num_rows, dtype=np.int32))
        logits = torch.from_numpy(logits_of(list(range(num_rows)), [1] * num_rows, 1000))
        arguments = (batch, bench.history, bench.lengths)
        bench.sampler(logits.clone(), *arguments)  # caches fill
        scratch = logits.clone()
        counts.append(count_calls(lambda: bench.sampler(scratch, *arguments)))  # noqa: B023
    assert counts[0] == counts[1] > 0


def test_a_batch_planned_before_a_change_is_refused() -> None:
    bench = Bench()
    bench.admit(0, Row([1]))
    batch = bench.state.plan(np.array([0]))
    bench.admit(1, Row([1]))
    with pytest.raises(ValueError, match="plan"):
        bench.sampler(torch.zeros(1, VOCAB), batch, bench.history, bench.lengths)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("stop_token_ids", [VOCAB]),
        ("eos_token_ids", [-1]),
        ("stop_token_ids", list(range(VOCAB)) * 6),
        ("allowed_token_ids", np.array([], dtype=np.int32)),
        ("allowed_token_ids", np.array([VOCAB], dtype=np.int32)),
        ("bad_words[1]", [[1], [1] * (MAX_BAD_WORD_TOKENS + 1)]),
        ("bad_words[0]", [[]]),
        ("bad_words[0]", [[1, VOCAB]]),
    ],
)
def test_a_request_that_cannot_be_held_is_refused_by_name(field: str, value: object) -> None:
    bench = Bench()
    with pytest.raises(ValidationError) as info:
        bench.admit(0, Row([1]), **{field.partition("[")[0]: value})
    assert info.value.field == field
    bench.admit(0, Row([1]))  # the row is still free


def test_logit_bias_needs_a_value_for_each_id() -> None:
    ids, values = np.array([1, 2], dtype=np.int32), np.array([1.0], dtype=np.float32)
    with pytest.raises(ValidationError, match="logit_bias"):
        Bench().admit(0, Row([1]), logit_bias_ids=ids, logit_bias_values=values)


def test_misuse_of_rows_is_refused() -> None:
    bench = Bench(num_rows=4)
    bench.admit(0, Row([1]))
    for row in (0, 4, -1):
        with pytest.raises(ValueError, match="row"):
            bench.admit(row, Row([1]))
    for rows in ([], [0, 1]):
        with pytest.raises(ValueError, match="plan"):
            bench.state.plan(np.array(rows, dtype=np.int32))
    bench.state.clear()
    bench.admit(0, Row([1]))


# --------------------------------------------------------------------------------------------------
# On a GPU


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_a_gpu_draws_the_same_tokens_without_waiting() -> None:
    host, device = Bench(), Bench(device=torch.device("cuda"))
    rng = np.random.default_rng(12)
    rows = [random_row(rng, "all") for _ in range(32)]
    for place, row in enumerate(rows):
        host.admit(place, row, logprobs=place % 3)
        device.admit(place, row, logprobs=place % 3)
    logits = rng.normal(0, 2, (32, VOCAB)).astype(np.float32)
    wanted = host.step(list(range(32)), logits)
    batch = device.state.plan(np.arange(32, dtype=np.int32))
    on_device = torch.from_numpy(logits).cuda()
    device.sampler(on_device.clone(), batch, device.history, device.lengths)  # constants are made once
    device.state.clear()
    for place, row in enumerate(rows):
        device.admit(place, row, logprobs=place % 3)
    batch = device.state.plan(np.arange(32, dtype=np.int32))
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = device.sampler(on_device, batch, device.history, device.lengths)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert result.token_B.tolist() == wanted.token_B.tolist()
    assert result.finish_B.tolist() == wanted.finish_B.tolist()
    assert result.logprobs is not None
    assert wanted.logprobs is not None
    assert torch.allclose(result.logprobs.columns.logprobs.cpu(), wanted.logprobs.columns.logprobs, atol=1e-4)
