"""Replicas of the HTTP server behind Ray Serve, all with the prompts of one directory.

`serve run deploy.ray_serve:build base=starter prompts=DIRECTORY`, or with a file: deploy/ray_serve.yaml.
"""

import asyncio
import logging
from pathlib import Path
from typing import Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from ray import serve

from spt_jax.commands.serve import Serve, start
from spt_jax.errors import ConfigError
from spt_jax.runtime import measure
from spt_jax.serving.folder import FolderWatch, follow
from spt_jax.serving.hosts import LOOPBACK
from spt_jax.serving.server import make_app

logger = logging.getLogger("ray.serve")

# Requests that a replica takes beyond those that the engine may hold: lists of models, health, classes.
SPARE = 64


class Settings(BaseModel):
    """Of every replica; a change replaces them. The names are those of `spt-jax serve`.

    allowed_hosts: all names, without ports, under which browsers may use the application; null for any.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: str
    prompts: Path
    name: str | None = None
    slots: int = Field(16, gt=0)
    queue: int = Field(256, gt=0)
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    prompt_memory: int | None = None
    compilation_cache: Path | None = None
    allowed_hosts: tuple[str, ...] | None = LOOPBACK


class Following(BaseModel):
    """The deployment's `user_config`; a change reaches running replicas.

    watch_seconds: between two looks at the directory of prompts.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    watch_seconds: float = Field(gt=0)


def build(settings: Settings) -> serve.Application:
    """The application, for `serve run`, `serve deploy` and `serve.run`."""
    replica = serve.ingress(lambda: make_replica_app(settings))(Replica)
    deployment = serve.deployment(
        replica,
        name="spt_jax",
        user_config={"watch_seconds": 5.0},
        # Above what the engine holds, so that a full queue is answered by the server, with 429.
        max_ongoing_requests=settings.slots + settings.queue + SPARE,
        # Three failures in a row replace a replica, which answers 503 until then.
        health_check_period_s=2,
        graceful_shutdown_timeout_s=60,
    )
    return deployment.bind()


def make_replica_app(settings: Settings) -> FastAPI:
    """Loads the base and the prompts, in the replica. A prompt that cannot be read is left out, and tried again.

    Raises:
      ConfigError, CheckpointError: the settings or the base are wrong.
    """
    if not settings.prompts.is_dir():
        raise ConfigError(f"prompts: {settings.prompts} is not a directory here")
    measure.keep_compiled_programs(settings.compilation_cache)
    service = start(Serve(**settings.model_dump(exclude={"prompts", "allowed_hosts"})))
    service.folder = settings.prompts
    service.admin_key = None  # A request reaches one replica; what all have to know is in the directory.
    watch = FolderWatch(service)
    for line in watch.look().lines():
        logger.info(line)
    app = make_app(service, hosts=settings.allowed_hosts)
    app.state.watch = watch
    return app


class Replica:
    """What Ray calls in a replica besides its application, which stops the engine at the end."""

    app: FastAPI  # by `serve.ingress`
    _following: asyncio.Task[None] | None = None

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """At the start and when `user_config` has changed."""
        seconds = Following.model_validate(user_config).watch_seconds
        if self._following is not None:
            self._following.cancel()
        self._following = asyncio.create_task(follow(self.app.state.watch, seconds, logger.info))

    async def check_health(self) -> None:
        """Ray replaces a replica that raises here."""
        failure = self.app.state.service.worker.failure
        if failure is not None:
            raise RuntimeError(f"the engine has failed: {failure}")

    def __del__(self) -> None:
        if self._following is not None:
            self._following.cancel()
