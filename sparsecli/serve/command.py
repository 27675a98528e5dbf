"""`sparsecli serve`: settle model and address, then answer until a signal stops the server."""

from __future__ import annotations

import ipaddress
import socket
from contextlib import closing
from pathlib import Path

from sparsecli import console
from sparsecli.console import Failure
from sparsecli.decode.native import binding
from sparsecli.generate.chat import TemplateProcess
from sparsecli.generate.decoder import DecoderOptions
from sparsecli.generate.native_decoder import open_engine
from sparsecli.generate.packed_weights import weight_type
from sparsecli.interchange.model_folder import model_folder
from sparsecli.model.files import MODEL_TYPE, read_description
from sparsecli.model.tokenizer import read_tokenizer

DEFAULT_CONTEXT = 4096


def run(
    model: str | None,
    *,
    name: str | None,
    host: str,
    port: int,
    api_key: str | None,
    slots: int,
    context: int | None,
    queue: int,
    seconds: float,
    grace: float,
    decoder: DecoderOptions,
) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        model: as in `evaluate`; None: the newest finished run.
        name: that clients use; by default the run's or the folder's.
        api_key: that clients must send, which an address beyond this machine needs.
        slots: texts that are decoded together.
        context: tokens of a text at most, its prompt included.
        queue: texts that may wait.
        seconds: a request may take.
        grace: seconds in which running requests may end when the server stops.
    Raises:
        Failure: there is no such model, it has an encoder, its context is shorter, the engine is not available, the
            address is taken, or another machine could reach the server without a key (exit code 2).
    """
    local = _is_loopback(host)
    if not local and not api_key:
        raise Failure(
            f"--host {host}: other machines could use the server; give --api-key, or SPARSECLI_API_KEY in the "
            "environment",
            exit_code=2,
        )
    if missing := binding.available():
        raise Failure(f"serve needs the native engine: {missing}")
    try:
        from sparsecli.generate.batcher import Batcher
        from sparsecli.serve.app import make_app
        from sparsecli.serve.http_server import serve_until_signal
        from sparsecli.serve.metrics import Metrics
        from sparsecli.serve.requests import Server
    except ImportError as error:
        raise Failure(
            f"{error.name} is not installed; pip install 'sparsecli[serve]' installs what serve needs"
        ) from None
    with (
        model_folder(model, keep=decoder.keep, types=(MODEL_TYPE,)) as folder,
        closing(_bind(host, port)) as door,
    ):
        description = read_description(folder)
        if description.spec.encoder:
            raise Failure(f"{folder}: has an encoder; serve continues texts with decoder-only models")
        longest = description.spec.max_positions
        if context is not None and context > longest:
            raise Failure(
                f"--context: {context} is longer than the model's context of {longest}", exit_code=2
            )
        capacity = min(DEFAULT_CONTEXT, longest) if context is None else context
        tokenizer = read_tokenizer(folder, description.spec.vocabulary.size)
        engine = open_engine(folder, description, decoder)
        metrics = Metrics()
        batcher = Batcher(engine, slots, capacity, queue, description.end_tokens, metrics)
        template = TemplateProcess(tokenizer.template, tokenizer.named) if tokenizer.template else None
        served = name or _name_of(model, folder)
        app = make_app(
            Server(
                served,
                batcher,
                tokenizer,
                description.spec.vocabulary.size,
                description.imported,
                metrics,
                api_key,
                seconds,
                template,
            ),
            hosts=("127.0.0.1", "localhost", "::1") if local else None,
        )
        address = f"http://{f'[{host}]' if ':' in host else host}:{door.getsockname()[1]}"
        console.say(
            f"serving {served} at {address} ({weight_type(engine.model)} weights, {binding.isa()}, "
            f"{engine.threads} threads; {slots} slots of {capacity} tokens)"
        )
        serve_until_signal(app, batcher, door, grace)
        batcher.stop(0)
        if template:
            template.close()
        engine.close()
        console.say("stopped")


def _name_of(model: str | None, folder: Path) -> str:
    """The name of a model: that of its run, its folder or its file."""
    if model is not None and not Path(model).is_dir():
        return Path(model).stem if model.endswith(".gguf") else model
    resolved = folder.resolve()
    return resolved.parent.name if resolved.name == "model" else resolved.name


def _is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return False


def _bind(host: str, port: int) -> socket.socket:
    """A socket at the address. Raises Failure where it is taken, or is none of this machine's."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        door = socket.socket(family, socket.SOCK_STREAM)
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        door.bind(address)
        door.listen()  # clients can connect, and wait until the model is loaded
    except (OSError, OverflowError) as error:
        reason = console.system_reason(error) or str(error)
        raise Failure(f"--host {host} --port {port}: {reason.lower()}; choose another address") from None
    return door
