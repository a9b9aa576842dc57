"""The errors that Tercet raises for its users.

    TercetError
    ├── ConfigError (ValueError)         an engine argument or environment variable is wrong
    ├── ValidationError (ValueError)     a request is wrong; nothing was sent to the engine
    ├── ModelNotFoundError               no weights where the model argument points
    ├── UnsupportedModelError            weights found, but Tercet cannot run them
    ├── QueueFullError                   the engine admits no more requests now; try again later
    ├── RequestError                     one admitted request failed; the engine goes on
    └── EngineError                      the engine as a whole
        ├── StartupError                 a process could not start (restarting would not help)
        ├── EngineDeadError              the engine has died; its requests with it
        └── EngineClosedError            this side has shut the engine down

A wrong wire message is the affair of `tercet.ipc`, not of users, and has its errors there.
"""


class TercetError(Exception):
    """Base of every error of Tercet."""


class _FieldError(TercetError, ValueError):
    """A value was refused: says which field, why, and how to mend it.

    Args:
        field: name of the argument, request field or environment variable, as its user writes it.
        problem: what is wrong and what would be right, with the value received.
    """

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem


class ConfigError(_FieldError):
    """An engine argument or environment variable has a value that cannot work."""


class ValidationError(_FieldError):
    """A field of a request is missing, of the wrong type or out of range."""


class ModelNotFoundError(TercetError):
    """There are no model files where the `model` argument points."""


class UnsupportedModelError(TercetError):
    """The model's architecture, file format or quantization is not one that Tercet runs."""


class QueueFullError(TercetError):
    """The engine's waiting queue is full; the request was not admitted and may be sent again later."""


class RequestError(TercetError):
    """An admitted request failed. Other requests are not affected.

    Args:
        request_id: the id that the caller gave, or was given.
        problem: what happened.
    """

    def __init__(self, request_id: str, problem: str) -> None:
        super().__init__(f"request {request_id}: {problem}")
        self.request_id = request_id
        self.problem = problem


class EngineError(TercetError):
    """The engine as a whole cannot serve."""


class StartupError(EngineError):
    """A process of the engine ended, or gave no sign of being ready, while it was starting.

    Args:
        problem: what happened, and to which process.
        field: the engine argument whose value is the cause, where one is; "" otherwise.
    """

    def __init__(self, problem: str, field: str = "") -> None:
        super().__init__(problem)
        self.field = field


class EngineDeadError(EngineError):
    """A process of the engine has died; requests in flight cannot be completed."""


class EngineClosedError(EngineError):
    """The engine was shut down by this side; no new request can be made of it."""
