"""One example of every message and tagged part, and the bytes of each that this protocol version stands for.

`python -m tests.ipc.golden_messages` writes the frames of examples that have none yet into `golden/`. A file that is
there is never rewritten: should the codec no longer write the same bytes, old peers would not read them, and
PROTOCOL_VERSION must change (then remove the files and run this again).

A file is: u32 number of frames, then for each frame u32 length and its bytes (little endian).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from tercet.ipc import messages as m
from tercet.ipc import telemetry as t
from tercet.ipc.codec import Buffer, Encoder

FOLDER: Final = Path(__file__).parent / "golden"
INLINE_BYTES: Final = 32  # so that small examples have buffer frames, whatever the threshold of the day


def i32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def u64(*values: int) -> np.ndarray:
    return np.array(values, np.uint64)


def i64(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def f64(*values: float) -> np.ndarray:
    return np.array(values, np.float64)


def f32(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def u8(*values: int) -> np.ndarray:
    return np.array(values, np.uint8)


SAMPLING = m.Sampling(
    max_tokens=7,
    temperature=0.75,
    top_p=0.5,
    top_k=40,
    min_p=0.125,
    presence_penalty=-0.5,
    frequency_penalty=1.5,
    repetition_penalty=1.25,
    min_tokens=2,
    eos_token_ids=[2, 300],
    stop_token_ids=[70000],
    logprobs=5,
    prompt_logprobs=0,
    logit_bias_ids=i32(5, 6),
    logit_bias_values=f32(-100.0, 0.5),
    allowed_token_ids=i32(*range(20)),
    bad_words=[[1], [2, 3]],
    logprob_token_ids=[9],
)
RANGE = m.MultiModalRange(
    modality="image", offset=3, length=4, content_hash=b"\x00\xff" * 8, data=np.arange(6, dtype=np.float16)
)
GRAMMAR = m.Grammar(kind="json", source='{"type": "object"}')
LOGPROBS = m.Logprobs(
    key=i32(3, 4),
    token_ids=np.arange(6, dtype=np.int32).reshape(2, 3),
    logprobs=np.linspace(-3, 0, 6, dtype=np.float32).reshape(2, 3),
    rank=i32(1, 9),
)
PROMPT_LOGPROBS = m.PromptLogprobs(
    key=i32(3),
    start=i32(1),
    offset=i32(0, 2),
    token_ids=np.arange(4, dtype=np.int32).reshape(2, 2),
    logprobs=np.linspace(-2, 0, 4, dtype=np.float32).reshape(2, 2),
    rank=i32(1, 2),
)
STATS = m.Stats(
    epoch=11,
    time_s=1.5,
    step=12,
    num_running=1,
    num_waiting=2,
    kv_cache_usage=0.25,
    num_free_blocks=3,
    prompt_tokens=4,
    generation_tokens=5,
    prefix_cache_queries=6,
    prefix_cache_hits=7,
    num_preemptions=8,
    recomputed_tokens=9,
    num_finished=10,
    num_aborted=11,
    num_frontends=12,
    dropped_messages=13,
    num_refused=14,
)
SERIES = t.Series(
    name="time_to_first_token_seconds",
    bounds=f64(0.5, 1.0),
    counts=i64(3, 2, 1),
    total=4.5,
    labels={"process": "frontend"},
)
STEP_TIMES = t.StepTimes(
    step=i64(7, 8),
    time_s=f64(1763899200.5, 1763899200.75),
    schedule_us=f32(1.0, 2.0),
    launch_us=f32(3.0, 4.0),
    wait_us=f32(5.0, 6.0),
    output_us=f32(7.0, 8.0),
    num_tokens=i32(9, 10),
    num_decodes=i32(1, 2),
)
METRICS = t.Metrics(
    series=[SERIES],
    frontends=[
        t.FrontendLoad(
            slot=1,
            name="api",
            num_running=2,
            num_waiting=3,
            num_requests=4,
            num_preparing=5,
            num_unread=6,
            serves_http=True,
            backlog=7,
        )
    ],
    queues={"core_waiting": 3},
    steps=STEP_TIMES,
)
SPAN = t.Span(
    name="decode",
    trace_id="4bf92f3577b34da6a3ce929d0e0e4736",
    span_id="00f067aa0ba902b7",
    parent_id="00f067aa0ba902b8",
    start_s=1763899200.5,
    end_s=1763899201.5,
    attributes={"tokens": 3, "kind": "x", "share": 0.5},
)
ADMISSION = m.Admission(
    row=1,
    gen=2,
    handle=2**64 - 1,
    prompt_len=3,
    token_ids=i32(10, 11, 12, 13),
    num_computed=2,
    seed=2**63,
    sampling=SAMPLING,
    blocks=[i32(4, 5), i32()],
    prompt_logprobs_from=1,
    adapter="a",
    multimodal=[RANGE],
    grammar=GRAMMAR,
    trace="00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b8-01",
    frontend=3,
)

EXAMPLES: Final[dict[str, msgspec.Struct]] = {
    "Hello": m.Hello(protocol_version=1, name="api", pid=4711, host="box/boot", epoch=5),
    "AddRequest": m.AddRequest(
        epoch=11,
        handle=2**64 - 2,
        token_ids=np.arange(100, dtype=np.int32),
        prompt_len=99,
        sampling=SAMPLING,
        seeds=[2**64 - 1],
        priority=-3,
        cache_salt="sål†",
        arrival_s=1763899200.5,
        read_prefix_cache=False,
        adapter="lora",
        multimodal=[RANGE],
        grammar=GRAMMAR,
        tenant="t",
        deadline_s=2.5,
        session="s",
        cache_hint="h",
        parent=6,
        ttl_s=3.5,
        trace="00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
    ),
    "Abort": m.Abort(epoch=11, handles=u64(1, 2**64 - 1), reason=m.Finish.EOS),
    "Call.ResetPrefixCache": m.Call(epoch=11, call_id=1, body=m.ResetPrefixCache()),
    "Call.PauseGeneration": m.Call(
        epoch=11, call_id=2, body=m.PauseGeneration(mode=m.PauseMode.KEEP, clear_cache=False)
    ),
    "Call.ResumeGeneration": m.Call(epoch=11, call_id=3, body=m.ResumeGeneration()),
    "Call.GetStats": m.Call(epoch=11, call_id=4, body=m.GetStats()),
    "Call.GetMetrics": m.Call(epoch=11, call_id=8, body=m.GetMetrics(steps_after=6)),
    "Call.CheckInvariants": m.Call(epoch=11, call_id=5, body=m.CheckInvariants()),
    "Call.StartProfile": m.Call(epoch=11, call_id=6, body=m.StartProfile(prefix="decode-32")),
    "Call.StopProfile": m.Call(epoch=11, call_id=7, body=m.StopProfile()),
    "Heartbeat": m.Heartbeat(epoch=11, step=8, step_age_s=0.5),
    "FrontendReport": t.FrontendReport(
        epoch=11, num_requests=4, num_preparing=5, num_unread=6, serves_http=True, series=[SERIES]
    ),
    "Spans": t.Spans(epoch=11, process="worker", pid=14, spans=[SPAN], frontend=3),
    "Goodbye": m.Goodbye(epoch=11, reason="bye"),
    "Welcome": m.Welcome(
        epoch=2**53 - 1,
        protocol_version=1,
        version="0.1.0",
        pid=12,
        model=m.ModelInfo(
            name="m",
            served_names=["m", "n"],
            max_model_len=2048,
            vocab_size=49152,
            dtype="float32",
            architecture="LlamaForCausalLM",
            eos_token_ids=[2],
            default_sampling={"temperature": 0.5, "top_k": 3},
            fingerprint="f",
        ),
        limits=m.Limits(
            max_num_seqs=1,
            max_num_batched_tokens=2,
            max_waiting=3,
            max_logprobs=4,
            max_children=5,
            block_size=6,
            num_blocks=7,
        ),
        files={"tokenizer.json": b"{}\x00\xff"},
        replicas=["ipc:///other"],
        heartbeat_s=2.0,
    ),
    "StepOutputs": m.StepOutputs(
        epoch=11,
        step=9,
        handle=u64(7, 8),
        first_index=i32(0, 5),
        token=i32(1, 2, 3),
        finish=u8(0, 3),
        offset=i32(0, 1, 3),
        weight_version=1,
        logprobs=msgspec.structs.replace(LOGPROBS, key=u64(7, 8)),
        prompt_logprobs=msgspec.structs.replace(PROMPT_LOGPROBS, key=u64(7)),
        started=m.Started(handle=u64(7), num_cached_tokens=i32(16), queue_s=f32(0.25), prefill_s=f32(0.5)),
        pooled=np.arange(40, dtype=np.float32).reshape(2, 20),
    ),
    "RequestFailed": m.RequestFailed(epoch=11, handle=7, code="invalid", message="top_p: must be in (0, 1]"),
    "Stats": STATS,
    "Reply": m.Reply(epoch=11, call_id=4, error="why", value=False, stats=STATS, metrics=METRICS),
    "WorkerHello": m.WorkerHello(
        protocol_version=1,
        rank=0,
        pid=13,
        fingerprint="f",
        groups=[m.KVGroup(num_layers=30, block_bytes=4096, sliding_window=512)],
        num_blocks=100,
        device="cpu",
        weights_digest="d",
    ),
    "WorkerWelcome": m.WorkerWelcome(epoch=11, protocol_version=1),
    "StepPlan": m.StepPlan(
        epoch=11,
        step=10,
        lane=1,
        num_draft=2,
        max_len=77,
        releases=i32(3),
        admissions=[ADMISSION],
        states=np.array([[1, 2], [3, 1]], np.int32),
        blocks=np.array([[0, 1, 2, 3], [0, 2, 0, 4], [0, 3, 1, 5]], np.int32),
        chunks=np.array([[1, 0, 4, 1]], np.int32),
        audit=m.Audit(row=i32(1), gen=i32(2), state=u8(2), block_offset=i32(0, 2), block=i32(4, 5)),
        encode=i32(1),
        evict_encoder=i32(2),
        transfers=i32(3),
        dummy=True,
    ),
    "StepResult": m.StepResult(
        epoch=11,
        step=10,
        row=i32(1, 2),
        gen=i32(2, 2),
        token=i32(5, 6, 7),
        finish=u8(0, 1),
        offset=i32(0, 2, 3),
        logprobs=LOGPROBS,
        prompt_logprobs=PROMPT_LOGPROBS,
        row_errors=m.RowErrors(row=i32(9), gen=i32(1), message=["not a number"]),
        pooled=f32(1.0),
        transfers_done=i32(1),
        encoder_done=i32(2),
        host_us=150.5,
        step_us=2000.25,
        gc_us=12.5,
    ),
    "WorkerFailed": m.WorkerFailed(epoch=11, rank=0, message="out of memory"),
    "Shutdown": m.Shutdown(epoch=11),
}


def encode(message: msgspec.Struct) -> list[Buffer]:
    return Encoder(inline_bytes=INLINE_BYTES).encode_bytes(message)


def pack(frames: Sequence[Buffer]) -> bytes:
    body = b"".join(struct.pack("<I", len(frame)) + bytes(frame) for frame in frames)
    return struct.pack("<I", len(frames)) + body


def unpack(data: bytes) -> list[Buffer]:
    frames: list[Buffer] = []
    (count,), offset = struct.unpack_from("<I", data), 4
    for _ in range(count):
        (size,) = struct.unpack_from("<I", data, offset)
        frames.append(data[offset + 4 : offset + 4 + size])
        offset += 4 + size
    assert offset == len(data)
    return frames


def read(name: str) -> list[Buffer]:
    """The committed frames of an example."""
    return unpack((FOLDER / f"{name}.bin").read_bytes())


def inboxes_of(message: Any) -> list[Any]:
    """The unions that a message is a member of."""
    unions = (m.FrontendToCore, m.CoreToFrontend, m.CoreToWorker, m.WorkerToCore)
    return [union for union in unions if type(message) in union.__args__]


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, example in EXAMPLES.items():
        path = FOLDER / f"{name}.bin"
        if not path.exists():
            path.write_bytes(pack(encode(example)))
            print(f"wrote {path.name}")
