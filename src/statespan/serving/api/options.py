"""ServerOptions: who may ask for how much."""

from dataclasses import dataclass

from statespan.errors import UserError


@dataclass(frozen=True)
class ServerOptions:
    """Limits of the HTTP server; the engine has its own (EngineOptions)."""

    name: str = "statespan"  # what clients call the model
    api_keys: tuple[str, ...] = ()  # any of them opens the server; none: it is open to all who reach it
    allowed_hosts: tuple[str, ...] = ()  # Host headers that are answered, against DNS rebinding; none: all
    max_body_bytes: int = 16 << 20
    body_timeout_s: float = 60.0  # for the whole body to arrive
    max_prompt_tokens: int = 1 << 20  # of one prompt
    max_new_tokens: int = 65536  # of one reply
    default_chat_tokens: int = 2048  # of a chat reply whose request sets no limit
    max_sequences: int = 64  # prompts times n of one request
    drain_s: float = 30.0  # from SIGTERM until replies that still run are cut off
    keep_alive_s: float = 15.0  # between signs of life in a stream that has nothing to say
    log_text: bool = False  # prompts and replies go into the log

    def __post_init__(self) -> None:
        for name in ("max_body_bytes", "max_prompt_tokens", "max_new_tokens", "default_chat_tokens", "max_sequences"):
            if getattr(self, name) < 1:
                raise UserError(f"ServerOptions.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("body_timeout_s", "keep_alive_s"):
            if not getattr(self, name) > 0:
                raise UserError(f"ServerOptions.{name} must be above 0, got {getattr(self, name)}")
        if not self.drain_s >= 0:  # nor NaN
            raise UserError(f"ServerOptions.drain_s must be 0 or above, got {self.drain_s}")
        if not self.name or any(not key for key in self.api_keys):
            raise UserError("the model's name and API keys must not be empty")
