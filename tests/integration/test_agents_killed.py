"""Two agents of torchrun share a build, and one of them is killed with all it started."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from commands import dpo_cache, logps_by_key, run
from distributed_run import free_port
from tiny_model import message_pairs, write_rows

NUM_PAIRS = 1600  # five units of work


@dataclass(frozen=True, kw_only=True)
class Agent:
    """One node of a job: torchrun's agent, its rank of the build and that rank's scoring process."""

    process: subprocess.Popen[bytes]
    log: Path

    def kill(self) -> None:
        """What a power cut does to a node."""
        agent = psutil.Process(self.process.pid)
        for process in [agent, *agent.children(recursive=True)]:
            process.kill()

    def says(self, text: str, *, timeout_s: float = 120) -> str:
        """Everything it has said, once that contains ``text``."""
        deadline = time.monotonic() + timeout_s
        while text not in (said := self.log.read_text()):
            assert time.monotonic() < deadline, f"never said {text!r}:\n{said}"
            time.sleep(0.05)
        return said


@contextmanager
def two_agents(build: list[str], folder: Path) -> Iterator[list[Agent]]:
    """Two nodes that meet on the loopback interface; the first hosts the store. The shell tells how a rank ended."""
    port = free_port()
    told = f"{' '.join(build)}; code=$?; echo rank $RANK ended with $code >&2; exit $code"
    with ExitStack() as held:
        agents = []
        for node in range(2):
            command = [
                *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"),
                *("--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", f"--rdzv-conf=is_host={1 - node}"),
                *("--no-python", "sh", "-c", told),
            ]
            log = folder / f"node-{node}.log"
            stderr = held.enter_context(log.open("wb"))
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            agent = Agent(process=subprocess.Popen(command, stderr=stderr, env=environment), log=log)
            held.callback(_end, agent)
            agents.append(agent)
        yield agents


def _end(agent: Agent) -> None:
    """torchrun's agent waits five minutes for a node that is gone."""
    if agent.process.poll() is None:
        agent.kill()
    agent.process.wait()


@contextmanager
def half_done_build(reference: Path, folder: Path) -> Iterator[tuple[list[Agent], list[str]]]:
    """A build of two nodes with some of its units finished, and the command of each."""
    dataset, cache = write_rows(folder / "pairs.jsonl", message_pairs(NUM_PAIRS)), folder / "cache"
    build = dpo_cache("build", "--model", reference, "--dataset", dataset, "--cache", cache, "--tokens-per-batch", 64)
    with two_agents(build, folder) as agents:
        deadline = time.monotonic() + 120
        while len(list(cache.glob("shards/*.parquet"))) < 2:
            assert time.monotonic() < deadline, "".join(agent.log.read_text() for agent in agents)
            time.sleep(0.01)
        yield agents, build


def test_a_node_that_is_lost_leaves_its_units_to_the_other(reference: Path, tmp_path: Path) -> None:
    with half_done_build(reference, tmp_path) as (agents, _):
        agents[1].kill()
        said = agents[0].says("ended with")
    assert "rank 0 ended with 0" in said, said
    assert "warning: rank 1 was lost" in said
    assert f"mixture train: {NUM_PAIRS:,} pairs" in said
    assert len(logps_by_key(tmp_path / "cache")) == NUM_PAIRS


def test_the_loss_of_the_node_that_hosts_the_store_ends_the_job_and_the_same_command_goes_on(
    reference: Path, tmp_path: Path
) -> None:
    with half_done_build(reference, tmp_path) as (agents, build):
        agents[0].kill()
        assert agents[1].process.wait(timeout=60) == 1
        said = agents[1].says("what is finished stays")
    assert "the same command" in said
    assert not list((tmp_path / "cache" / "mixtures").iterdir())
    kept = len(logps_by_key(tmp_path / "cache"))
    report = run(build)
    assert (report["pairs_reused"], report["pairs_scored"]) == (kept, NUM_PAIRS - kept)
    assert 0 < kept < NUM_PAIRS
