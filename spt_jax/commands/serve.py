"""`spt-jax serve`: serves one base and a directory of prompts over HTTP."""

import os
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spt_jax.bases.base import describe_base, load_base
from spt_jax.commands.options import Serve
from spt_jax.errors import ConfigError
from spt_jax.prompts.names import prompt_directory
from spt_jax.runtime import measure
from spt_jax.runtime.files import nearest_path
from spt_jax.runtime.remote import RemoteFolder, check_path, url_of
from spt_jax.runtime.sharding import make_mesh
from spt_jax.runtime.waits import spoken
from spt_jax.serving.bank import PromptBank
from spt_jax.serving.chunks import check_chunk
from spt_jax.serving.engine import Engine
from spt_jax.serving.lookup import check_draft_size
from spt_jax.serving.shared import can_share, check_entries, is_shared

if TYPE_CHECKING:
    from spt_jax.serving.service import Service

ADMIN_KEY = "SPT_JAX_ADMIN_KEY"
LONG_PROMPT = 512  # From this number of positions on, a prompt should be shared.
DEFAULT_CONTEXT = 8192  # The slots of a base with 131,072 positions would rarely fit on a device.


def serve(options: Serve) -> None:
    """Serves until a signal stops the server."""
    try:
        from spt_jax.serving.hosts import allowed_hosts
        from spt_jax.serving.server import bound, make_app, server_of
    except ImportError as error:
        raise ConfigError(f"serving needs the extra: pip install 'spt_jax[serve]' ({error})") from error
    if options.prompts is not None and not url_of(options.prompts) and not prompt_directory(options.prompts).is_dir():
        raise ConfigError(f"--prompts {options.prompts} is not a directory{nearest_path(options.prompts)}")
    for path in filter(None, (options.prompts, options.base)):
        check_path(path)
    sizes = "prompt_memory", "max_prompt", "max_body"
    for name in ("slots", "context", "queue", *sizes, "body_seconds", "drain_seconds"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; it must be more than 0")
    check_chunk(options.chunk)
    check_draft_size(options.lookup)
    check_entries(options.shared)
    measure.keep_compiled_programs(options.compilation_cache)
    with bound(options.host, options.port) as listening, tempfile.TemporaryDirectory(prefix="spt_jax-") as copies:
        host, port, *_ = listening.getsockname()
        hosts = allowed_hosts(host, options.allowed_hosts)
        service = start(options, Path(copies))
        limits = {"max_body_bytes": options.max_body * 1024, "body_seconds": options.body_seconds}
        app = make_app(service, **limits, hosts=hosts)
        listening.listen()
        print(f"http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
        server = server_of(app, head_seconds=options.body_seconds, drain_seconds=options.drain_seconds)
        server.run(sockets=[listening])


def start(command: Serve, copies: Path | None = None) -> "Service":
    """Loads base and prompts, compiles the programs for the shortest requests, and starts the engine.

    Args:
      command: the options.
      copies: an empty directory for the copy of a remote directory of prompts; default a new one.

    Raises:
      RemoteError: a remote directory cannot be reached.
      ConfigError, CheckpointError: the base or the mesh is invalid.
      RefusedError: a prompt is invalid, and the command is strict.
    """
    from spt_jax.serving.service import Service
    from spt_jax.serving.worker import Worker

    began = time.perf_counter()
    mesh = make_mesh(command.mesh)
    with spoken(f"loading {command.base}"):
        base = load_base(
            command.base, revision=command.revision, dtype=command.dtype, mesh=mesh, quantize=command.quantize
        )
    print(describe_base(base))
    budget = None if command.prompt_memory is None else command.prompt_memory * 2**20
    bank = PromptBank(base, budget_bytes=budget)
    context = command.context or min(DEFAULT_CONTEXT, base.layout.max_positions)
    engine = Engine(
        bank,
        slots=command.slots,
        context=context,
        lookup=command.lookup,
        chunk=command.chunk,
        shared=command.shared,
    )
    if base.layout.generates:
        with spoken("compiling the programs for requests"):
            engine.warm_decoding()
            engine.warm(engine.bank.held(None), 1)
    name = command.name or Path(command.base).name
    worker = Worker(engine, queue=command.queue)
    folder, refresh = _folder(command.prompts, copies)
    service = Service(worker, name, folder, os.environ.get(ADMIN_KEY) or None, command.max_prompt * 2**20)
    with spoken("loading the prompts"):
        _load_prompts(service, strict=command.strict)
    note_long_prompts(bank, engine.context, command.shared)
    service.refresh = refresh
    service.worker.start()
    print(
        f"{name}, prompts: {len(engine.bank.names)}, slots: {command.slots} of {engine.context:,} positions"
        f"{f', shared: {command.shared:,} positions' if command.shared else ''}"
        f" ({engine.slot_bytes / 2**20:,.0f} MiB; see --context),"
        f" ready in {time.perf_counter() - began:.1f} s"
    )
    return service


def note_long_prompts(bank: PromptBank, context: int, shared: int) -> None:
    """Prints which prompts leave no room in a slot, and how to share the longest if each request copies it.

    Args:
      bank: the prompts.
      context: the number of positions of a slot.
      shared: the number of positions for shared prompts.
    """
    entries = {name: bank.entry(name) for name in bank.names}
    lengths = {name: entry.positions for name, entry in entries.items() if entry.generates}
    copied = {name: length for name, length in lengths.items() if not is_shared(length, shared)}
    advice = "--context or --shared" if can_share(bank.base.model) else "--context"
    for name, length in copied.items():
        if length + 2 > context:  # A token of the request, and one of the answer.
            print(f"note: {name!r} takes {length:,} positions, but a slot has {context:,}; raise {advice}")
    longest, name = max(((length, name) for name, length in copied.items() if length + 2 <= context), default=(0, ""))
    if longest >= LONG_PROMPT and can_share(bank.base.model):
        print(
            f"note: each request under {name!r} copies its {longest:,} positions to its slot;"
            f" --shared {longest} keeps them in one place for all slots"
        )


def _folder(prompts: Path | None, copies: Path | None) -> tuple[Path | None, Callable[[], None]]:
    """Returns the local directory of prompts, and a function that brings it up to date with a remote one."""
    url = None if prompts is None else url_of(prompts)
    if prompts is None or url is None or url.startswith("hf://"):
        return None if prompts is None else prompt_directory(prompts), lambda: None
    local = (copies or Path(tempfile.mkdtemp(prefix="spt_jax-"))) / "prompts"
    copy = RemoteFolder(url, local)
    return local, copy.refresh


def _load_prompts(service: "Service", *, strict: bool) -> None:
    """Loads all prompts of the directory of prompts, and prints which are left out."""
    from spt_jax.serving.prompt_directories import RefusedError
    from spt_jax.serving.protocol import NAME

    kinds: set[Any] = set()
    for folder in sorted(service.folder.iterdir()) if service.folder is not None else ():
        if folder.is_file():
            continue
        if not re.fullmatch(NAME, folder.name):  # an incomplete save, or a directory of the file system
            print(f"{folder} is left out: this is not a valid prompt name")
            continue
        try:
            service.load(folder.name)
            # The first prompt of a kind compiles for all.
            kind = service.bank.entry(folder.name).kind
            if kind not in kinds:
                service.warm(folder.name)
            kinds.add(kind)
        except RefusedError as error:
            if strict:
                raise
            print(f"{folder} is left out: {error}")
