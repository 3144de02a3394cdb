"""`statespan serve`: an OpenAI-compatible server of a saved model."""

import argparse
import os
import stat
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from statespan.cli.arguments import Command, positive_int
from statespan.cli.checkpoint_path import checkpoint_path
from statespan.errors import UserError
from statespan.machine import usable_device

if TYPE_CHECKING:
    from statespan.serving.api.options import ServerOptions
    from statespan.serving.api.service import Service
    from statespan.serving.options import EngineOptions

LOOPBACK = ("127.0.0.1", "localhost", "::1")
KEYS = "STATESPAN_API_KEYS"
DRAFTS = 6  # a step, where a draft model is given
UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder of a checkpoint or of a training run")
    parser.add_argument("--name", help="what clients call the model (default: the folder's name)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, mps (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the weights (default: as stored)")
    parser.add_argument("--quantize", choices=("int8", "experts_int8", "int4"), help="the weights, while loading")
    parser.add_argument("--chat-template", metavar="FILE", help="Jinja file, or 'plain' (default: the checkpoint's)")
    _add_network(parser.add_argument_group("network"))
    _add_limits(parser.add_argument_group("limits of a request"))
    _add_engine(parser.add_argument_group("engine; bytes may be given as 512M or 4G"))


def _add_network(group: Any) -> None:
    group.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s)")
    group.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: %(default)s)")
    group.add_argument("--allowed-host", action="append", default=[], metavar="NAME", help="Host header to answer")
    group.add_argument("--api-key-file", type=Path, metavar="FILE", help=f"a key a line; or in ${KEYS}, with commas")
    group.add_argument("--tls-cert", type=Path, metavar="FILE", help="certificate chain")
    group.add_argument("--tls-key", type=Path, metavar="FILE", help="its private key")
    group.add_argument(
        "--drain", type=float, default=30, metavar="S", help="for replies that run at SIGTERM (default: 30)"
    )
    group.add_argument("--replicas", type=positive_int, default=1, metavar="N", help="engines, through Ray Serve")
    group.add_argument("--log-text", action="store_true", help="log prompts and replies, which are left out otherwise")


def _add_limits(group: Any) -> None:
    group.add_argument("--max-body-bytes", type=num_bytes, default=16 << 20, metavar="N", help="default: 16M")
    group.add_argument("--max-prompt-tokens", type=positive_int, default=1 << 20, metavar="N", help="default: 1048576")
    group.add_argument("--max-new-tokens", type=positive_int, default=65536, metavar="N", help="default: %(default)s")
    group.add_argument(
        "--max-sequences", type=positive_int, default=64, metavar="N", help="prompts times n (default: 64)"
    )
    group.add_argument(
        "--max-waiting", type=positive_int, default=2048, metavar="N", help="more get a 429 (default: 2048)"
    )


def _add_engine(group: Any) -> None:
    group.add_argument("--max-rows", type=positive_int, default=64, metavar="N", help="sequences at once (default: 64)")
    group.add_argument("--prefill-tokens", type=positive_int, default=2048, metavar="N", help="a step (default: 2048)")
    group.add_argument(
        "--num-drafts", type=positive_int, metavar="N", help="speculate: tokens a step, found in the text (default: 0)"
    )
    group.add_argument(
        "--draft", metavar="MODEL", help="drafted by a smaller model, or a subword one for bytes (6 tokens a step)"
    )
    group.add_argument("--page-bytes", type=num_bytes, metavar="N", help="for keys and values (default: what is free)")
    group.add_argument("--cache-bytes", type=num_bytes, default=1 << 30, metavar="N", help="prefix cache (default: 1G)")
    group.add_argument("--spill-bytes", type=num_bytes, default=0, metavar="N", help="of it in CPU memory (default: 0)")
    group.add_argument("--spill-dir", type=Path, metavar="DIR", help="and on disk, found again after a restart")


def num_bytes(text: str) -> int:
    """ "512M" as a number of bytes, for `type=`."""
    number, unit = (text[:-1], UNITS[text[-1].upper()]) if text[-1:].upper() in UNITS else (text, 1)
    try:
        value = int(number) * unit
    except ValueError:
        value = -1
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of bytes; write 1000000, 512M or 4G")
    return value


def run(arguments: argparse.Namespace) -> None:
    _require_libraries(arguments.replicas)
    from statespan.serving.api import logs
    from statespan.serving.api.server import bind, serve

    options, tls = server_options(arguments), tls_files(arguments)
    path = checkpoint_path(arguments.model)
    sock = bind(arguments.host, arguments.port)  # before the model: an address in use is told at once
    service = _service(arguments, path, options)
    logs.configure()
    told = warnings(arguments, options, has_template=service.template is not None)
    serve(service, sock, tls=tls, warnings=told)


def _require_libraries(replicas: int) -> None:
    """UserError where an extra is not installed, before anything takes time."""
    libraries = ["fastapi", "uvicorn", "prometheus_client", "jinja2"] + (["ray"] if replicas > 1 else [])
    missing = [name for name in libraries if find_spec(name) is None]
    if missing:
        extra = "ray" if missing == ["ray"] else "serve"
        raise UserError(f"serving needs {', '.join(missing)}: pip install 'statespan[{extra}]'")


def server_options(arguments: argparse.Namespace) -> "ServerOptions":
    """Limits, keys and names of the HTTP server."""
    from statespan.serving.api.options import ServerOptions

    hosts = ("127.0.0.1", "localhost", "[::1]") if arguments.host in LOOPBACK else ()
    return ServerOptions(
        name=arguments.name or Path(arguments.model).resolve().name,
        api_keys=read_keys(arguments.api_key_file),
        allowed_hosts=(*hosts, *arguments.allowed_host),
        max_body_bytes=arguments.max_body_bytes,
        max_prompt_tokens=arguments.max_prompt_tokens,
        max_new_tokens=arguments.max_new_tokens,
        max_sequences=arguments.max_sequences,
        drain_s=arguments.drain,
        log_text=arguments.log_text,
    )


def engine_options(arguments: argparse.Namespace) -> "EngineOptions":
    """Memory and sharing of the engine."""
    from statespan.serving.options import EngineOptions

    return EngineOptions(
        max_rows=arguments.max_rows,
        page_budget_bytes=arguments.page_bytes,
        max_waiting=arguments.max_waiting,
        prefill_tokens=arguments.prefill_tokens,
        num_drafts=arguments.num_drafts or (0 if arguments.draft is None else DRAFTS),
        cache_bytes=arguments.cache_bytes,
        spill_bytes=arguments.spill_bytes,
        spill_dir=arguments.spill_dir,
    )


def read_keys(file: Path | None) -> tuple[str, ...]:
    """API keys: of a file, one a line, or of the environment. Never of the command line, which all processes can read.

    Raises:
        UserError: the file cannot be read, or has no key. That others may read it is said on stderr.
    """
    if file is None:
        return tuple(key for part in os.environ.get(KEYS, "").split(",") if (key := part.strip()))
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        mode = file.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: the API keys cannot be read: {error}") from None
    if os.name == "posix" and mode & (stat.S_IRGRP | stat.S_IROTH):
        print(f"statespan: {file} can be read by others; chmod 600 {file}", file=sys.stderr)
    keys = tuple(key for line in lines if (key := line.strip()) and not key.startswith("#"))
    if not keys:
        raise UserError(f"{file} has no API key; write one a line")
    return keys


def tls_files(arguments: argparse.Namespace) -> tuple[Path, Path] | None:
    """Certificate and key, or neither."""
    cert, key = arguments.tls_cert, arguments.tls_key
    if (cert is None) != (key is None):
        raise UserError("TLS needs both --tls-cert and --tls-key")
    for file in filter(None, (cert, key)):
        if not file.is_file():
            raise UserError(f"{file}: no such file; give the PEM files of the certificate and its key")
    return None if cert is None else (cert, key)


def warnings(arguments: argparse.Namespace, options: "ServerOptions", *, has_template: bool) -> list[str]:
    """What an operator should know about this server."""
    lines: list[str] = []
    if arguments.host not in LOOPBACK:
        if not options.api_keys:
            lines.append(f"everybody who reaches {arguments.host} can use this server: set --api-key-file")
        if arguments.tls_cert is None:
            lines.append("prompts, replies and keys cross the network unencrypted: set --tls-cert and --tls-key")
    if not has_template:
        lines.append("the checkpoint has no chat template, so chats are refused: set --chat-template")
    return lines


def _service(arguments: argparse.Namespace, path: Path, options: "ServerOptions") -> "Service":
    from statespan.serving.api.service import Service
    from statespan.serving.backend import LocalBackend, ModelSource
    from statespan.serving.chat_template import find_chat_template

    template = find_chat_template(path, arguments.chat_template)
    usable_device(arguments.device)
    draft = None if arguments.draft is None else checkpoint_path(arguments.draft)
    source = ModelSource(path, arguments.device, arguments.dtype, arguments.quantize, draft)
    if arguments.replicas == 1:
        model = source.load()
        backend = LocalBackend(model, engine_options(arguments), source.load_draft())
        config, tokenizer = model.config, model.tokenizer
    else:
        from statespan.checkpoints.identify import identify
        from statespan.checkpoints.tokenizer import find_tokenizer
        from statespan.serving.replicas import ReplicaBackend

        model, config = None, identify(path).read_config()
        backend, tokenizer = (
            ReplicaBackend(source, engine_options(arguments), arguments.replicas),
            find_tokenizer(path, config),
        )
    return Service(backend, config=config, tokenizer=tokenizer, template=template, model=model, options=options)


COMMAND = Command(
    "Serve a saved model over HTTP, as OpenAI's API; / is a playground. It listens at 127.0.0.1 unless told.",
    "statespan serve demo-output/checkpoint --chat-template plain --port 8000",
    add_arguments,
    run,
)
