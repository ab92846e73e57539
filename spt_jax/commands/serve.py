"""`spt-jax serve`: serves one base and a directory of prompts over HTTP."""

import dataclasses
import os
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from spt_jax.bases.base import describe_base, load_base
from spt_jax.errors import ConfigError
from spt_jax.prompts.names import prompt_directory
from spt_jax.runtime import measure
from spt_jax.runtime.files import nearest_path
from spt_jax.runtime.remote import RemoteFolder, check_path, url_of
from spt_jax.runtime.sharding import MeshConfig, make_mesh
from spt_jax.serving.bank import PromptBank
from spt_jax.serving.engine import Engine

if TYPE_CHECKING:
    from spt_jax.serving.service import Service

ADMIN_KEY = "SPT_JAX_ADMIN_KEY"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Serve:
    """Serves a base and any number of saved prompts, with OpenAI's endpoints and a web page at /.

    If the environment variable SPT_JAX_ADMIN_KEY is set, it is the key for adding and removing prompts while serving.

    Attributes:
      base: a directory in Hugging Face format, a hub id, or starter.
      prompts: a directory of prompt directories of this library or of PEFT, a URL (s3://, gs://) or the hub id of one;
        a prompt that is added while serving is read from there again. Prompts are loaded from nowhere else.
      name: name of the bare base among the models; default the last part of `base`.
      revision: revision of the base on the hub.
      strict: do not start if a prompt cannot be read; by default, such a prompt is left out with a message.
      host: address to listen on.
      port: port to listen on; 0 takes a free port.
      allowed_hosts: host names, without ports, under which web pages may use the server, such as a proxy's. On a
        loopback address, they are allowed in addition to localhost and the address; on other addresses, any name is
        allowed unless names are given.
      slots: number of requests that run at once.
      context: positions per slot, for prompt and answer together; default all positions of the base.
      queue: number of answers that may wait; further requests get 429. A client with less than an equal share may
        exceed this.
      dtype: precision of the base; default by device.
      quantize: int8 stores the base's matrices in one byte per weight.
      mesh: device mesh.
      prompt_memory: MiB of prompts on the device; if exceeded, the least recently used are removed from it. Default no
        limit.
      max_body: most KiB of a request's body.
      body_seconds: time limit for a request's body, and for its head.
      drain_seconds: time limit for running requests after SIGTERM.
      compilation_cache: a directory for compiled programs, which makes later starts faster.
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
    quantize: str | None = None
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
        if self.prompts is not None and not url_of(self.prompts) and not prompt_directory(self.prompts).is_dir():
            raise ConfigError(f"--prompts {self.prompts} is not a directory{nearest_path(self.prompts)}")
        for path in filter(None, (self.prompts, self.base)):
            check_path(path)
        for name in ("slots", "context", "queue", "prompt_memory", "max_body", "body_seconds", "drain_seconds"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"--{name.replace('_', '-')} is {value}; it must be more than 0")
        measure.keep_compiled_programs(self.compilation_cache)
        with bound(self.host, self.port) as listening, tempfile.TemporaryDirectory(prefix="spt_jax-") as copies:
            host, port, *_ = listening.getsockname()
            hosts = allowed_hosts(host, self.allowed_hosts)
            service = start(self, Path(copies))
            limits = {"max_body_bytes": self.max_body * 1024, "body_seconds": self.body_seconds}
            app = make_app(service, **limits, hosts=hosts)
            listening.listen()
            print(f"http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
            server = server_of(app, head_seconds=self.body_seconds, drain_seconds=self.drain_seconds)
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
    base = load_base(command.base, revision=command.revision, dtype=command.dtype, mesh=mesh, quantize=command.quantize)
    print(describe_base(base))
    budget = None if command.prompt_memory is None else command.prompt_memory * 2**20
    engine = Engine(PromptBank(base, budget_bytes=budget), slots=command.slots, context=command.context)
    engine.warm_decoding()
    engine.warm(engine.bank.held(None), 1)
    name = command.name or Path(command.base).name
    worker = Worker(engine, queue=command.queue)
    folder, refresh = _folder(command.prompts, copies)
    service = Service(worker, name, folder, os.environ.get(ADMIN_KEY) or None)
    _load_prompts(service, strict=command.strict)
    service.refresh = refresh
    service.worker.start()
    print(
        f"{name} and {len(engine.bank.names)} prompts in {command.slots} slots, ready in"
        f" {time.perf_counter() - began:.1f} s"
    )
    return service


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
    from spt_jax.serving.protocol import NAME
    from spt_jax.serving.service import RefusedError

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
