"""`python -m spt_jax serve`: one base and a directory of prompts behind HTTP."""

import dataclasses
import os
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from spt_jax.bases.base import describe_base, load_base
from spt_jax.errors import ConfigError
from spt_jax.runtime import measure
from spt_jax.runtime.sharding import MeshConfig, make_mesh
from spt_jax.serving.bank import PromptBank
from spt_jax.serving.engine import Engine

if TYPE_CHECKING:
    from spt_jax.serving.service import Service

ADMIN_KEY = "SPT_JAX_ADMIN_KEY"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Serve:
    """Serves a base and any number of saved prompts, through OpenAI's endpoints and a page at /.

    The environment's SPT_JAX_ADMIN_KEY, if set, is the key that adds and removes prompts while serving.

    Attributes:
      base: a directory in Hugging Face format, a hub id, or starter.
      prompts: a directory of prompt directories, ours or PEFT's; nothing else is read for requests.
      name: of the bare base among the models; default the last part of `base`.
      revision: of the base on the hub.
      strict: a prompt that cannot be read ends the start, where it would be left out with a line.
      host: address to listen on.
      port: and its port; 0 takes a free one.
      allowed_hosts: names, without ports, under which web pages may use the server, such as a proxy's. On a loopback
        address they are added to localhost and the address; on others, any name will do unless some are given.
      slots: requests answered at once.
      context: positions of each of them, prompt and answer together; default all that the base has.
      queue: answers that may wait; more get 429. A client with less than an equal share may always add some.
      dtype: precision of the base; default by device.
      quantize: int8 keeps the base's matrices in a byte per weight.
      mesh: devices, and what is split over them.
      prompt_memory: MiB of prompts on the device, of which the least recently used leave; default no limit.
      max_body: KiB of a request's body.
      body_seconds: in which it must have come; and before it, the request's head.
      drain_seconds: for requests under way after SIGTERM.
      compilation_cache: a directory where compiled programs are kept, for a quicker start.
    """

    base: str
    prompts: Path | None = None
    name: str | None = None
    revision: str | None = None
    strict: bool = False
    host: str = "127.0.0.1"
    port: int = 8000
    allowed_hosts: tuple[str, ...] = ()
    slots: int = 16
    context: int | None = None
    queue: int = 256
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    quantize: Literal["int8"] | None = None
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    prompt_memory: int | None = None
    max_body: int = 1024
    body_seconds: float = 30.0
    drain_seconds: int = 60
    compilation_cache: Path | None = None

    def run(self) -> None:
        try:
            from spt_jax.serving.hosts import allowed_hosts
            from spt_jax.serving.server import bound, make_app, server_of
        except ImportError as error:
            raise ConfigError(f"serving needs the extra: pip install 'spt_jax[serve]' ({error})") from error
        if self.prompts is not None and not self.prompts.is_dir():
            raise ConfigError(f"--prompts {self.prompts} is no directory")
        for name in ("slots", "context", "queue", "prompt_memory", "max_body", "body_seconds", "drain_seconds"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"--{name.replace('_', '-')} is {value}; it must be more than 0")
        measure.keep_compiled_programs(self.compilation_cache)
        with bound(self.host, self.port) as listening:
            host, port, *_ = listening.getsockname()
            hosts = allowed_hosts(host, self.allowed_hosts)
            service = start(self)
            limits = {"max_body_bytes": self.max_body * 1024, "body_seconds": self.body_seconds}
            app = make_app(service, **limits, hosts=hosts)
            listening.listen()
            print(f"http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
            server = server_of(app, head_seconds=self.body_seconds, drain_seconds=self.drain_seconds)
            server.run(sockets=[listening])


def start(command: Serve) -> "Service":
    """Loads base and prompts, compiles what the shortest requests need, and starts the engine.

    Raises:
      ConfigError, CheckpointError: the base or the mesh is wrong.
      RefusedError: a prompt is, and the command is strict.
    """
    from spt_jax.serving.service import Service
    from spt_jax.serving.worker import Worker

    began = time.perf_counter()
    mesh = make_mesh(command.mesh)
    base = load_base(command.base, revision=command.revision, dtype=command.dtype, mesh=mesh, quantize=command.quantize)
    print(describe_base(base))
    budget = None if command.prompt_memory is None else command.prompt_memory * 2**20
    engine = Engine(PromptBank(base, budget_bytes=budget), slots=command.slots, context=command.context)
    engine.warm_decoding()
    engine.warm(engine.bank.held(None), 1)
    name = command.name or Path(command.base).name
    service = Service(Worker(engine, queue=command.queue), name, command.prompts, os.environ.get(ADMIN_KEY) or None)
    _load_prompts(service, strict=command.strict)
    service.worker.start()
    print(
        f"{name} and {len(engine.bank.names)} prompts in {command.slots} slots, ready in"
        f" {time.perf_counter() - began:.1f} s"
    )
    return service


def _load_prompts(service: "Service", *, strict: bool) -> None:
    """Reads all directories of the directory of prompts, and says which are left out."""
    from spt_jax.serving.protocol import NAME
    from spt_jax.serving.service import RefusedError

    kinds: set[Any] = set()
    for folder in sorted(service.folder.iterdir()) if service.folder is not None else ():
        if folder.is_file():
            continue
        if not re.fullmatch(NAME, folder.name):  # a save under way, or what a file system keeps for itself
            print(f"{folder} is left out: this cannot be the name of a prompt")
            continue
        try:
            service.load(folder.name)
            # One prompt of a kind compiles for all.
            kind = service.bank.entry(folder.name).kind
            if kind not in kinds:
                service.warm(folder.name)
            kinds.add(kind)
        except RefusedError as error:
            if strict:
                raise
            print(f"{folder} is left out: {error}")
