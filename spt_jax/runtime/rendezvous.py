"""Makes the processes of a run wait for each other at an address, before `jax.distributed` starts there.

The service of JAX ends a process with a native stack trace when another process is missing, and does not name it.
"""

import contextlib
import json
import socket
import time

from spt_jax.errors import ConfigError

WAIT_SECONDS = 300.0
_RETRY_SECONDS = 0.5
_ANSWER_SECONDS = 10.0  # The first process answers at its own deadline, which may be this much later.
_LONGEST_LINE = 1 << 16


def meet(coordinator: str, count: int, index: int) -> None:
    """Waits until all processes of a run have joined, for at most `WAIT_SECONDS`.

    Args:
      coordinator: host:port. The first process listens on that port, and frees it afterwards.
      count: number of processes.
      index: index of this process, from 0.

    Raises:
      ConfigError: some processes did not join, or two have the same index; it is raised in all processes that joined
        and names them. Or the address cannot be used.
    """
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"--processes.coordinator is {coordinator!r}; it must be HOST:PORT of the first process")
    deadline = time.monotonic() + WAIT_SECONDS
    problem = _receive(int(port), count, deadline) if index == 0 else _report(host, int(port), index, deadline)
    if problem:
        raise ConfigError(problem)


def _receive(port: int, count: int, deadline: float) -> str | None:
    """In the first process: waits for the others, then sends all of them the outcome."""
    with contextlib.ExitStack() as stack:
        try:
            dual = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if dual else socket.AF_INET
            listener = stack.enter_context(socket.create_server(("", port), family=family, dualstack_ipv6=dual))
        except OSError as error:
            return f"--processes.coordinator: port {port} cannot be used here ({error.strerror}); choose another"
        here: dict[int, socket.socket] = {}
        problem = None
        while problem is None and len(here) < count - 1:
            listener.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                connection = stack.enter_context(listener.accept()[0])
            except TimeoutError:
                missing = ", ".join(str(i) for i in range(1, count) if i not in here)
                problem = f"of {count} processes, these did not join: {missing}"
                continue
            connection.settimeout(5.0)
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
                index = json.loads(connection.makefile("rb").readline(_LONGEST_LINE))["index"]
                if index in here or not 0 < index < count:
                    problem = f"--processes.index is {index} in two processes, or is not below {count}"
                here.setdefault(index, connection)
        for connection in here.values():
            with contextlib.suppress(OSError):
                connection.sendall(json.dumps({"problem": problem}).encode() + b"\n")
        return problem


def _report(host: str, port: int, index: int, deadline: float) -> str | None:
    """In any other process: reports to the first one, and waits for its answer."""
    reason = ""
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((host, port), timeout=max(deadline - time.monotonic(), 0.01)) as connection:
                connection.sendall(json.dumps({"index": index}).encode() + b"\n")
                connection.settimeout(max(deadline - time.monotonic(), 0) + _ANSWER_SECONDS)
                return json.loads(connection.makefile("rb").readline(_LONGEST_LINE))["problem"]
        except (OSError, ValueError, TypeError, KeyError) as error:
            reason = str(error)
            time.sleep(_RETRY_SECONDS)
    return f"process 0 did not answer at {host}:{port} ({reason})"
