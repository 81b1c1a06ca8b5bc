"""Two nodes on this machine: network namespaces, joined by a link that can be cut."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

PORT = 29400


@dataclass(frozen=True)
class Node:
    """A network namespace with one interface, of the same name as it.

    number: 1, where the nodes meet, or 2.
    """

    name: str
    number: int

    @property
    def address(self) -> str:
        return f"10.99.0.{self.number}"

    def torchrun(self, arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
        """Starts the agent of this node and its one rank, as docs/running.md has it; what they print goes to a log."""
        where = [f"--rdzv-endpoint=10.99.0.1:{PORT}", f"--local-addr={self.address}"]
        # By its name alone a node cannot tell here whether the address is its own: both have this machine's.
        where += [f"--rdzv-conf=is_host={int(self.number == 1)}"]
        agent = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", *where]
        command = ["ip", "netns", "exec", self.name, sys.executable, *agent, "--max-restarts=3"]
        with log.open("ab") as file:
            return subprocess.Popen(
                [*command, "-m", "dinoforge", *arguments],
                stdout=file,
                stderr=file,
                env=os.environ | {"GLOO_SOCKET_IFNAME": self.name},
            )

    def kill(self) -> None:
        """Everything that runs on it, at once."""
        for pid in _ip("netns", "pids", self.name).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def cut_off(self) -> None:
        _ip("-n", self.name, "link", "set", self.name, "down")

    def bring_back(self) -> None:
        _ip("-n", self.name, "link", "set", self.name, "up")


@contextmanager
def two_nodes() -> Iterator[tuple[Node, Node]]:
    """The nodes; gone, with all that runs on them, afterwards. Skips the test where namespaces cannot be made."""
    if shutil.which("ip") is None:
        pytest.skip("two nodes were not run: needs the Debian package iproute2")
    nodes = tuple(Node(f"forge{os.getpid()}{letter}"[-15:], number) for number, letter in ((1, "a"), (2, "b")))
    made = []
    try:
        for node in nodes:
            try:
                _ip("netns", "add", node.name)
            except subprocess.CalledProcessError as error:
                pytest.skip(f"two nodes were not run: not permitted here: {error.stderr.strip()}")
            made.append(node)
        a, b = nodes
        _ip("link", "add", a.name, "netns", a.name, "type", "veth", "peer", "name", b.name, "netns", b.name)
        for node in nodes:
            _ip("-n", node.name, "addr", "add", f"{node.address}/24", "dev", node.name)
            _ip("-n", node.name, "link", "set", "lo", "up")
            node.bring_back()
        yield a, b
    finally:
        for node in made:
            while _ip("netns", "pids", node.name):
                node.kill()
                time.sleep(0.1)
            _ip("netns", "del", node.name)


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True).stdout
