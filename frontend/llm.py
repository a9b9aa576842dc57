"""`LLM`: an engine for synchronous code.

The requests live on an event loop in a thread of this object's own, so that the connection is served (its
heartbeats, its end) while the caller computes, and `LLM` may be used from any thread, several at a time.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import difflib
import os
import threading
import weakref
from collections.abc import Callable, Coroutine, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Self, TypeAlias, TypeVar

import msgspec

from tercet.config import NEUTRAL, EngineArgs, is_neutral
from tercet.errors import ConfigError, EngineClosedError, ValidationError
from tercet.frontend.async_llm import AsyncLLM, NewRequest
from tercet.frontend.batches import Pending, generate_all
from tercet.frontend.beam_search import BeamSearchOutput, beam_search
from tercet.frontend.client import forked_error
from tercet.frontend.input_processor import derive_child_seed
from tercet.frontend.inputs import PromptType, as_prompts
from tercet.frontend.metrics import Metric
from tercet.frontend.model_config import ModelConfig
from tercet.frontend.outputs import RequestOutput
from tercet.frontend.progress import Progress, UseTqdm
from tercet.frontend.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams
from tercet.frontend.status_line import StatusLine
from tercet.frontend.tokenizer import Tokenizer
from tercet.frontend.validation import shown
from tercet.ipc.messages import ModelInfo

T = TypeVar("T")
Message: TypeAlias = Mapping[str, Any]


class LLM:
    """An engine with a model, used synchronously.

    Args:
        model: a directory in Hugging Face form, a .gguf file, a hub id, or None for the default model.
        chat_template: Jinja source, or name of one of the model's templates, for `chat`.
        engine_args: any other argument of `EngineArgs`, by name. Those of vLLM's that are not among them are
            accepted at values that change nothing, see `tercet.config.NEUTRAL`.

    Raises:
        ConfigError: an argument cannot work, or there is none of that name.
        ModelNotFoundError, UnsupportedModelError: there is no model that could run.
        StartupError: a process could not start; nothing is left running.
    """

    def __init__(
        self, model: str | None = None, *, chat_template: str | None = None, **engine_args: Any
    ) -> None:
        quiet = {"disable_log_stats": True, **engine_args}  # a program's output is its own
        self._open(_engine_args(model, quiet), chat_template)

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs) -> LLM:
        """As the constructor, from arguments already put together."""
        llm = cls.__new__(cls)
        llm._open(engine_args, None)
        return llm

    def _open(self, engine_args: EngineArgs, chat_template: str | None) -> None:
        self._chat_template = chat_template
        self._seed = engine_args.seed
        self._num_requests = 0
        with StatusLine() as status:
            self._engine = AsyncLLM.from_engine_args(engine_args, progress=status.show)
        self._pending = Pending(self._engine)
        self._thread = _LoopThread()
        # Runs at exit too, and never twice; holds no reference to this object.
        self._finalizer = weakref.finalize(self, _close, self._engine, self._thread)
        try:
            self._thread.run(self._engine.start())
        except BaseException:
            self.shutdown()
            raise

    # ---- generation

    def generate(
        self,
        prompts: PromptType | Sequence[PromptType],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: UseTqdm = True,
        lora_request: None = None,
        priority: int | Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts; outputs come in the order of the prompts.

        Args:
            prompts: one or several: text, token ids, or a dict of either with options.
            sampling_params: for all, or one for each; None takes the model's defaults. Their `output_kind`
                is ignored: every output is final.
            use_tqdm: show a progress bar; or the class (or function) that makes one.
            lora_request: for callers that name it; only None is supported yet.
            priority: for all, or one for each; lower runs earlier, with scheduling_policy='priority'.

        Raises:
            ValidationError: a prompt or parameter is wrong. Like every other error it ends the whole call,
                and requests already made are aborted.
            RequestError: a request failed.
            EngineDeadError, EngineClosedError: there is no engine any more.
        """
        _check_only("lora_request", lora_request, None)
        many = as_prompts(prompts)
        requests = self._pair(many, sampling_params, priority)
        return self._generate(requests, use_tqdm, add_special_tokens=True)

    def enqueue(
        self,
        prompts: PromptType | Sequence[PromptType],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        lora_request: None = None,
        priority: int | Sequence[int] | None = None,
        use_tqdm: UseTqdm = True,
    ) -> list[str]:
        """Send prompts without waiting for their completions; `wait_for_completion` collects them.

        Returns once all are at the engine, which it may have to make room for. Arguments are those of
        `generate`; the progress bar counts what is sent.

        Returns: the request ids, which the outputs have again.

        Raises:
            ValidationError: a prompt or parameter is wrong: none of this call is pending then.
        """
        _check_only("lora_request", lora_request, None)
        requests = self._pair(as_prompts(prompts), sampling_params, priority)
        with Progress(use_tqdm, len(requests), "Adding requests") as progress:
            return self._thread.run(self._pending.add(requests, progress))

    def wait_for_completion(
        self, output_type: type[RequestOutput] | None = None, *, use_tqdm: UseTqdm = True
    ) -> list[RequestOutput]:
        """Wait for all that was enqueued; outputs come in the order in which it was.

        Args:
            output_type: for callers that name it; only RequestOutput is made yet.
            use_tqdm: as for `generate`.

        Raises: as `generate`; what was enqueued is aborted then.
        """
        if output_type not in (None, RequestOutput):
            raise ValidationError("output_type", f"must be RequestOutput or None; got {shown(output_type)}")
        with Progress(use_tqdm, len(self._pending), "Processed prompts") as progress:
            return self._thread.run(self._pending.collect(progress))

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: UseTqdm = True,
        lora_request: None = None,
        *,
        priority: int | Sequence[int] | None = None,
        chat_template: str | None = None,
        chat_template_content_format: Literal["auto"] = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or several, each a list of messages {'role': …, 'content': …}.

        The chat template alone decides on special tokens. Arguments not named here are those of `generate`.

        Args:
            chat_template: Jinja source, or name of one of the model's; None is the LLM's, then the model's.
            chat_template_content_format: for callers that name it; only 'auto' is supported yet.
            add_generation_prompt: end the prompt where the assistant's answer begins.
            continue_final_message: let the model go on in the last message instead.
            tools: descriptions of functions, for templates that show them.
            chat_template_kwargs: further variables for the template.

        Raises:
            ValidationError: also where the template refuses the conversation.
        """
        _check_only("lora_request", lora_request, None)
        _check_only("chat_template_content_format", chat_template_content_format, "auto")
        if not isinstance(messages, (list, tuple)):
            raise ValidationError("messages", f"must be a list of messages; got {shown(messages)}")
        is_one = bool(messages) and isinstance(messages[0], Mapping)
        tokenizer = self.get_tokenizer()

        def render(conversation: Any) -> PromptType:
            return str(
                tokenizer.apply_chat_template(
                    conversation,
                    tools=tools,
                    chat_template=chat_template or self._chat_template,
                    add_generation_prompt=add_generation_prompt and not continue_final_message,
                    continue_final_message=continue_final_message,
                    tokenize=False,
                    **(chat_template_kwargs or {}),
                )
            )

        prompts = [render(messages)] if is_one else _each(messages, render)
        requests = self._pair(prompts, sampling_params, priority)
        return self._generate(requests, use_tqdm, add_special_tokens=False)

    def beam_search(
        self,
        prompts: PromptType | Sequence[PromptType],
        params: BeamSearchParams,
        *,
        use_tqdm: UseTqdm = False,
    ) -> list[BeamSearchOutput]:
        """The `beam_width` likeliest continuations of each prompt, best first.

        Raises:
            ValidationError: a field is wrong; beam_width needs an engine with max_logprobs of twice as much.
        """
        many = as_prompts(prompts)
        with Progress(use_tqdm, len(many), "Beam search") as progress:
            return self._thread.run(_beam_search_all(self._engine, many, params, progress))

    def _pair(
        self,
        prompts: Sequence[PromptType],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        priority: int | Sequence[int] | None,
    ) -> list[NewRequest]:
        if sampling_params is None:
            sampling_params = self.get_default_sampling_params()
        all_params = _one_for_each("sampling_params", sampling_params, len(prompts))
        priorities = _one_for_each("priority", 0 if priority is None else priority, len(prompts))
        final = {id(params): _final_only(params) for params in all_params}
        return [
            NewRequest(prompt, final[id(params)], priority=one, default_seed=self._draw_seed())
            for prompt, params, one in zip(prompts, all_params, priorities, strict=True)
        ]

    def _draw_seed(self) -> int | None:
        """For a request without a seed: the next of the sequence that the engine's seed begins."""
        if self._seed is None:
            return None
        self._num_requests += 1
        return derive_child_seed(self._seed, self._num_requests)

    def _generate(
        self, requests: list[NewRequest], use_tqdm: UseTqdm, add_special_tokens: bool
    ) -> list[RequestOutput]:
        with Progress(use_tqdm, len(requests), "Processed prompts") as progress:
            return self._thread.run(generate_all(self._engine, requests, progress, add_special_tokens))

    # ---- the engine

    @property
    def model_info(self) -> ModelInfo:
        """The model's name, context length, vocabulary and so on."""
        return self._engine.model_info

    @property
    def model_config(self) -> ModelConfig:
        """The model under vLLM's names."""
        return self._engine.model_config

    @property
    def address(self) -> str:
        """Where further frontends can connect to this engine."""
        return self._engine.address

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer; EngineError where the engine has none."""
        return self._thread.run(self._engine.get_tokenizer())

    def get_default_sampling_params(self) -> SamplingParams:
        """The model's own defaults (its generation_config), where it has any."""
        return self._engine.get_default_sampling_params()

    def reset_prefix_cache(self) -> bool:
        """Forget every cached block that no running request holds; True if that were all of them."""
        return self._thread.run(self._engine.reset_prefix_cache())

    def start_profile(self, prefix: str | None = None) -> None:
        """Trace the worker's steps from now on: see `AsyncLLM.start_profile`."""
        self._thread.run(self._engine.start_profile(prefix))

    def stop_profile(self) -> None:
        """End the trace; returns once its file is written."""
        self._thread.run(self._engine.stop_profile())

    def get_metrics(self) -> list[Metric]:
        """Every gauge and counter of the engine, as of now."""
        return self._thread.run(self._engine.get_metrics())

    def shutdown(self) -> None:
        """Abort what is unfinished and end the engine's processes. Idempotent; `with` and exit do it too.

        In a forked child it does nothing: the engine is the parent's.
        """
        self._finalizer()

    close = shutdown

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.shutdown()

    def __repr__(self) -> str:
        return f"LLM(model={self._engine.model_info.name!r}, address={self.address!r})"


class _LoopThread:
    """An event loop in a thread of its own; a forked child has neither."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._loop = asyncio.new_event_loop()
        # A daemon: at exit Python waits for other threads before it runs the finalizer that ends this one.
        self._thread = threading.Thread(target=self._serve, name="tercet-llm", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine there and wait for it; an interrupt (Ctrl-C) here cancels it there."""
        if os.getpid() != self._pid:
            coroutine.close()
            raise forked_error()
        if not self._thread.is_alive():
            coroutine.close()
            raise EngineClosedError("the engine was shut down on this side")
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            while not future.done():
                concurrent.futures.wait([future], timeout=1.0)
                if not self._thread.is_alive() and not future.done():  # shut down from another thread
                    raise EngineClosedError("the engine was shut down on this side")
            return future.result()
        except concurrent.futures.CancelledError:
            raise EngineClosedError("the engine was shut down on this side") from None
        except BaseException:
            future.cancel()
            raise

    def _serve(self) -> None:
        try:
            self._loop.run_forever()
        finally:
            self._loop.run_until_complete(_cancel_others())
            self._loop.close()

    def stop(self) -> None:
        if os.getpid() == self._pid and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            if threading.current_thread() is not self._thread:
                self._thread.join()


def _close(engine: AsyncLLM, thread: _LoopThread) -> None:
    engine.shutdown()
    thread.stop()


async def _cancel_others() -> None:
    """End every other task of the running loop."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _beam_search_all(
    engine: AsyncLLM, prompts: Sequence[PromptType], params: BeamSearchParams, progress: Progress
) -> list[BeamSearchOutput]:
    found = []
    for prompt in prompts:
        output = await beam_search(engine, prompt, params)
        progress.finished(len(output.prompt_token_ids), params.max_tokens * params.beam_width)
        found.append(output)
    return found


def _engine_args(model: str | None, engine_args: Mapping[str, Any]) -> EngineArgs:
    known = [field.name for field in dataclasses.fields(EngineArgs)]
    given = {name: value for name, value in engine_args.items() if not is_neutral(name, value)}
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, [*known, *NEUTRAL], n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(name, f"is no engine argument{hint}")
    return EngineArgs(model=model, **given)


def _each(conversations: Sequence[Any], render: Callable[[Any], PromptType]) -> list[PromptType]:
    """Render conversations; an error names the one that is wrong."""
    prompts = []
    for index, conversation in enumerate(conversations):
        try:
            prompts.append(render(conversation))
        except ValidationError as error:
            if not error.field.startswith("messages"):
                raise
            field = f"messages[{index}]{error.field.removeprefix('messages')}"
            raise type(error)(field, error.problem) from None
    return prompts


def _check_only(field: str, value: object, supported: str | None) -> None:
    """Refuse an argument of vLLM's whose other values Tercet does not serve."""
    if value is not supported and not (isinstance(value, str) and value == supported):
        raise ValidationError(field, f"{shown(value)} is not supported yet; leave it out")


def _one_for_each(field: str, value: T | Sequence[T], count: int) -> list[T]:
    if not isinstance(value, (list, tuple)):
        return [value] * count  # type: ignore[list-item]  # a single value: sequences went the other way
    if len(value) != count:
        raise ValidationError(
            field, f"must be one value, or one for each of the {count} prompts; got {len(value)}"
        )
    return list(value)


def _final_only(params: SamplingParams) -> SamplingParams:
    if not isinstance(params, SamplingParams):
        raise ValidationError("sampling_params", f"must be SamplingParams; got {shown(params)}")
    if params.output_kind is RequestOutputKind.FINAL_ONLY:
        return params
    return msgspec.structs.replace(params, output_kind=RequestOutputKind.FINAL_ONLY, skip_clone=False)
