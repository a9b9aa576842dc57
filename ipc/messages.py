"""The protocol: every message that crosses a wire between frontend, core and worker.

Messages are positional MessagePack arrays tagged with their class name, so they grow only by
appending fields with defaults; `tests/ipc/golden` keeps one frame of each. Columns are numpy arrays
(`codec.py` says how they travel), one entry per request or token, never one object per request and step.

Every message but the two Hellos carries `epoch`, the number of the core's life that it belongs to;
receivers drop and count messages of other epochs.

Reserved fields (tenant, deadline, session, cache_hint, parent, ttl, adapter, grammar, multimodal and the
optional plan sections) are part of the schema from the first day; a core that does not implement one
refuses requests that set it.
"""

# ruff: noqa: RUF012  (msgspec copies a struct's mutable defaults; ruff cannot see that these are structs)

from __future__ import annotations

import enum
from typing import TypeAlias

from tercet.ipc.message_base import Column, Message, Part
from tercet.ipc.telemetry import FrontendReport, Metrics, Spans

PROTOCOL_VERSION = 1


class Finish(enum.IntEnum):
    """Why a row or request ended, as one byte of the `finish` columns."""

    NONE = 0
    EOS = 1  # an end-of-sequence token of the model
    STOP_TOKEN = 2  # one of the request's stop_token_ids: the last token names it
    LENGTH = 3  # max_tokens or max_model_len
    ABORT = 4  # aborted by its frontend, or the frontend left
    ERROR = 5  # this request failed; a RequestFailed says why


class RowState(enum.IntEnum):
    """State of a live row of the worker's batch."""

    HELD = 0  # owns its blocks, computes nothing
    DECODE = 1  # one token (and its drafts) in every step of its lane
    PREFILL = 2  # runs only through the plan's chunks


class PauseMode(enum.IntEnum):
    """What PauseGeneration does with requests in flight."""

    ABORT = 0  # end them with Finish.ABORT
    WAIT = 1  # let them finish, then pause
    KEEP = 2  # freeze them; resume goes on where they stopped


# --------------------------------------------------------------------------------------------------
# Parts: what a request is


class Sampling(Part, frozen=True, kw_only=True):
    """How to choose tokens. Every default is resolved by the frontend; the core checks ranges again.

    `max_tokens` counts output tokens. Token ids are below the model's vocab_size. `eos_token_ids` is
    empty under ignore_eos. `logprobs` is the number of top entries beside the chosen token, None for
    none at all.
    """

    max_tokens: int
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 is all
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    eos_token_ids: list[int] = []
    stop_token_ids: list[int] = []
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias_ids: Column | None = None  # i32[k]
    logit_bias_values: Column | None = None  # f32[k]
    allowed_token_ids: Column | None = None  # i32[k]
    bad_words: list[list[int]] = []  # token sequences
    logprob_token_ids: list[int] = []  # reserved


class MultiModalRange(Part, frozen=True, kw_only=True):
    """Reserved: positions [offset, offset + length) of the prompt stand for one encoded input."""

    modality: str
    offset: int
    length: int
    content_hash: bytes
    data: Column | None = None


class Grammar(Part, frozen=True, kw_only=True):
    """Reserved: a constraint on the output."""

    kind: str
    source: str


# --------------------------------------------------------------------------------------------------
# frontend -> core


class Hello(Message, frozen=True, kw_only=True):
    """frontend -> core, first message of a connection. Answered by Welcome or Goodbye.

    `pid` and `host` let a core on the same host watch the frontend's process.
    """

    protocol_version: int
    name: str
    pid: int
    host: str  # socket.gethostname() and boot id: equal only on one host
    epoch: int = 0  # the epoch that this frontend last knew, 0 at first


class AddRequest(Message, frozen=True, kw_only=True):
    """frontend -> core. Answered by StepOutputs until each child has a finish, or by RequestFailed.

    Stands for `n = len(seeds)` children that share the prompt; child i has the handle `handle + i`.
    Handles are chosen by the frontend and unique among its unfinished requests. `token_ids` is the
    prompt followed by outputs already delivered (a resumed request has some, and then exactly one seed).
    """

    epoch: int
    handle: int  # u64
    token_ids: Column  # i32[prompt_len + outputs]
    prompt_len: int
    sampling: Sampling
    seeds: list[int]  # u64 each
    priority: int = 0  # lower runs earlier
    cache_salt: str = ""
    arrival_s: float = 0.0  # frontend's time.time()
    read_prefix_cache: bool = True
    adapter: str = ""  # reserved
    multimodal: list[MultiModalRange] = []  # reserved
    grammar: Grammar | None = None  # reserved
    tenant: str = ""  # reserved
    deadline_s: float = 0.0  # reserved
    session: str = ""  # reserved
    cache_hint: str = ""  # reserved
    parent: int = 0  # reserved
    ttl_s: float = 0.0  # reserved
    trace: str = ""  # W3C traceparent; core and worker then report Spans of the request


class Abort(Message, frozen=True, kw_only=True):
    """frontend -> core. Not answered: the frontend has already closed the stream. Idempotent."""

    epoch: int
    handles: Column  # u64[k]
    reason: Finish = Finish.ABORT  # EOS stands for a stop string found by the frontend


class ResetPrefixCache(Part, frozen=True, tag=True):
    """Forget every cached block that no running request holds. Value: True if all were forgotten."""


class PauseGeneration(Part, frozen=True, tag=True):
    """Stop planning steps; new requests queue. Replied to once nothing is in flight."""

    mode: PauseMode = PauseMode.ABORT
    clear_cache: bool = True


class ResumeGeneration(Part, frozen=True, tag=True):
    """Undo PauseGeneration."""


class GetStats(Part, frozen=True, tag=True):
    """Ask for a Stats now."""


class GetMetrics(Part, frozen=True, tag=True):
    """Ask for Stats and Metrics now: totals of the core and of every frontend, those that have left included.

    `steps_after` asks for the steps after that one, as far as the core remembers them; None for no steps.
    """

    steps_after: int | None = None


class CheckInvariants(Part, frozen=True, tag=True):
    """Recount blocks and rows. Value: True; a fault in the accounts comes back as the reply's error."""


class StartProfile(Part, frozen=True, tag=True):
    """Trace the worker from its next step on. The core passes it on; TERCET_TORCH_PROFILER_DIR allows it.

    `prefix` begins the trace's file name: PROFILE_PREFIX.
    """

    prefix: str = ""


class StopProfile(Part, frozen=True, tag=True):
    """End the trace; replied to once its file is written. The core passes it on."""


PROFILE_PREFIX = r"[A-Za-z0-9._-]{0,64}"
"""What StartProfile's prefix may be: it goes into a file name."""

CallBody: TypeAlias = (
    ResetPrefixCache
    | PauseGeneration
    | ResumeGeneration
    | GetStats
    | GetMetrics
    | CheckInvariants
    | StartProfile
    | StopProfile
)


class Call(Message, frozen=True, kw_only=True):
    """frontend -> core, or core -> worker: an ordered barrier between plans. Answered by Reply."""

    epoch: int
    call_id: int
    body: CallBody


class Heartbeat(Message, frozen=True, kw_only=True):
    """Any -> any, when nothing else was sent for the interval that Welcome names. Not answered."""

    epoch: int
    step: int = 0
    step_age_s: float = 0.0


class Goodbye(Message, frozen=True, kw_only=True):
    """Either end leaves. A frontend's requests are aborted; a core's frontends see EngineDeadError."""

    epoch: int
    reason: str = ""


# --------------------------------------------------------------------------------------------------
# core -> frontend


class ModelInfo(Part, frozen=True, kw_only=True):
    """What a frontend must know of the model."""

    name: str
    served_names: list[str]
    max_model_len: int
    vocab_size: int
    dtype: str
    architecture: str
    eos_token_ids: list[int]
    default_sampling: dict[str, float | int] = {}
    fingerprint: str = ""


class Limits(Part, frozen=True, kw_only=True):
    """What the core accepts; a frontend refuses the rest before it crosses the wire."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_waiting: int
    max_logprobs: int
    max_children: int
    block_size: int
    num_blocks: int


class Welcome(Message, frozen=True, kw_only=True):
    """core -> frontend, answers Hello. `files` are the tokenizer and template files by name."""

    epoch: int
    protocol_version: int
    version: str
    pid: int
    model: ModelInfo
    limits: Limits
    files: dict[str, bytes]
    replicas: list[str] = []
    heartbeat_s: float = 1.0


class Logprobs(Part, frozen=True, kw_only=True):
    """Log-probabilities of sampled tokens: t rows of the chosen token, then the top k, best first.

    `key` is the row (worker -> core) or the handle (core -> frontend), one entry per token.
    Where a request asked for fewer than k entries the reader cuts the rest.
    """

    key: Column  # i32[t] or u64[t]
    token_ids: Column  # i32[t, 1 + k]
    logprobs: Column  # f32[t, 1 + k]
    rank: Column  # i32[t], of the chosen token, 1 is the most likely


class PromptLogprobs(Part, frozen=True, kw_only=True):
    """Log-probabilities of prompt tokens: entry j of key i is for prompt position start[i] + j.

    Position p is scored by the logits at p - 1, so position 0 never appears.
    """

    key: Column  # i32[m] or u64[m]
    start: Column  # i32[m]
    offset: Column  # i32[m + 1], CSR into the columns below
    token_ids: Column  # i32[t, 1 + k]
    logprobs: Column  # f32[t, 1 + k]
    rank: Column  # i32[t]


class Started(Part, frozen=True, kw_only=True):
    """Facts about requests whose first token is in this message."""

    handle: Column  # u64[m]
    num_cached_tokens: Column  # i32[m]
    queue_s: Column  # f32[m], from arrival at the core to the first step
    prefill_s: Column  # f32[m], from the first step to the first token


class StepOutputs(Message, frozen=True, kw_only=True):
    """core -> frontend, answers AddRequest. One per step for each frontend that has tokens in it, or one for
    many steps to a frontend that did not read meanwhile.

    Request i got tokens [offset[i], offset[i + 1]) (one each where offset is absent), the first of which
    is its output number first_index[i].
    """

    epoch: int
    step: int
    handle: Column  # u64[m]
    first_index: Column  # i32[m]
    token: Column  # i32[t]
    finish: Column  # u8[m], Finish
    offset: Column | None = None  # i32[m + 1]
    weight_version: int = 0
    logprobs: Logprobs | None = None
    prompt_logprobs: PromptLogprobs | None = None
    started: Started | None = None
    pooled: Column | None = None  # reserved


class RequestFailed(Message, frozen=True, kw_only=True):
    """core -> frontend: this request ends with an error; `code` is one of FAILURE_CODES."""

    epoch: int
    handle: int
    code: str
    message: str


FAILURE_CODES = ("invalid", "queue_full", "unsupported", "internal", "paused", "shutdown", "unread")


class Stats(Message, frozen=True, kw_only=True):
    """core -> frontend: gauges now, and counters since the core started."""

    epoch: int
    time_s: float
    step: int
    num_running: int
    num_waiting: int
    kv_cache_usage: float  # share of blocks that running requests hold
    num_free_blocks: int
    prompt_tokens: int
    generation_tokens: int
    prefix_cache_queries: int  # tokens looked up
    prefix_cache_hits: int  # tokens found
    num_preemptions: int
    recomputed_tokens: int
    num_finished: int
    num_aborted: int
    num_frontends: int
    dropped_messages: int
    num_refused: int = 0


class Reply(Message, frozen=True, kw_only=True):
    """core -> frontend, or worker -> core: answers Call. `error` is None on success."""

    epoch: int
    call_id: int
    error: str | None = None
    value: bool = True
    stats: Stats | None = None
    metrics: Metrics | None = None


# --------------------------------------------------------------------------------------------------
# core <-> worker


class KVGroup(Part, frozen=True, kw_only=True):
    """Layers that share one block table."""

    num_layers: int
    block_bytes: int  # over all layers of the group
    sliding_window: int = 0  # tokens, 0 is none


class WorkerHello(Message, frozen=True, kw_only=True):
    """worker -> core, once it can run steps. Answered by WorkerWelcome."""

    protocol_version: int
    rank: int
    pid: int
    fingerprint: str  # of the engine config that it was started with
    groups: list[KVGroup]
    num_blocks: int  # per group, block 0 (the null block) included
    device: str
    weights_digest: str = ""


class WorkerWelcome(Message, frozen=True, kw_only=True):
    """core -> worker, answers WorkerHello. A worker that had an earlier epoch clears its rows."""

    epoch: int
    protocol_version: int


class Admission(Part, frozen=True, kw_only=True):
    """A request enters a row. All other state is rebuilt from (prompt_len, token_ids)."""

    row: int
    gen: int
    handle: int
    prompt_len: int
    token_ids: Column  # i32[prompt_len + outputs]
    num_computed: int
    seed: int
    sampling: Sampling
    blocks: list[Column]  # i32[k] for each group
    prompt_logprobs_from: int = -1  # first position still to be scored, -1 for none
    adapter: str = ""  # reserved
    multimodal: list[MultiModalRange] = []  # reserved
    grammar: Grammar | None = None  # reserved
    trace: str = ""  # W3C traceparent of the core's span; the worker then reports Spans
    frontend: int = 0  # that Spans are for


class Audit(Part, frozen=True, kw_only=True):
    """The core's view of its live rows, for the worker to compare with its own before it runs the step."""

    row: Column  # i32[m]
    gen: Column  # i32[m]
    state: Column  # u8[m]
    block_offset: Column  # i32[m + 1], CSR
    block: Column  # i32[t], group 0


class StepPlan(Message, frozen=True, kw_only=True):
    """core -> every worker of the replica, answered by StepResult: what changes, then run one step.

    Applied in this order: releases, admissions, states, blocks. Then the step runs every row in state
    DECODE of `lane`, `1 + num_draft` tokens wide, and the chunks.
    """

    epoch: int
    step: int
    lane: int = 0
    num_draft: int = 0
    max_len: int = 0  # no row that runs is longer than this after the step
    releases: Column | None = None  # i32[k], rows
    admissions: list[Admission] = []
    states: Column | None = None  # i32[k, 2]: row, RowState
    blocks: Column | None = None  # i32[k, 4]: group, row, index, block (0 frees)
    chunks: Column | None = None  # i32[k, 4]: row, start, length, sample
    audit: Audit | None = None
    encode: Column | None = None  # reserved
    evict_encoder: Column | None = None  # reserved
    transfers: Column | None = None  # reserved: id, src, dst, group, blocks
    dummy: bool = False  # reserved: run without rows, for lock-step experts


class RowErrors(Part, frozen=True, kw_only=True):
    """Rows whose computation failed; their tokens of this step are void."""

    row: Column  # i32[m]
    gen: Column  # i32[m]
    message: list[str]


class StepResult(Message, frozen=True, kw_only=True):
    """worker (rank 0) -> core, answers StepPlan. Frozen rows have no entry."""

    epoch: int
    step: int
    row: Column  # i32[m]
    gen: Column  # i32[m]
    token: Column  # i32[t]
    finish: Column  # u8[m]
    offset: Column | None = None  # i32[m + 1], absent at one token each
    logprobs: Logprobs | None = None
    prompt_logprobs: PromptLogprobs | None = None
    row_errors: RowErrors | None = None
    pooled: Column | None = None  # reserved
    transfers_done: Column | None = None  # reserved
    encoder_done: Column | None = None  # reserved
    host_us: float = 0.0  # worker CPU from message to launch
    step_us: float = 0.0  # message to result
    gc_us: float = 0.0  # of collections of garbage since the last result


class WorkerFailed(Message, frozen=True, kw_only=True):
    """worker -> core, last message before it exits with a non-zero code."""

    epoch: int
    rank: int
    message: str


class Shutdown(Message, frozen=True, kw_only=True):
    """core -> worker: finish the plans already received, then exit 0."""

    epoch: int


# One union per inbox.
FrontendToCore: TypeAlias = Hello | AddRequest | Abort | Call | Heartbeat | FrontendReport | Goodbye
CoreToFrontend: TypeAlias = (
    Welcome | StepOutputs | RequestFailed | Reply | Stats | Spans | Heartbeat | Goodbye
)
CoreToWorker: TypeAlias = WorkerWelcome | StepPlan | Call | Heartbeat | Shutdown
WorkerToCore: TypeAlias = WorkerHello | StepResult | Reply | Spans | Heartbeat | WorkerFailed
