"""A real Slurm on this machine for the length of a test: a controller, a CPU node and a node with two pretend GPUs.

Needs root and Debian's slurmctld, slurmd and slurm-client; no systemd, munge, cgroups or database. Everything listens
on the loopback address. Only the processes started here are stopped.
"""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).parent
ETC = Path("/etc/slurm")


def missing() -> str | None:
    """Return why Slurm cannot be started here, or None."""
    absent = [name for name in ("slurmctld", "slurmd", "sbatch", "squeue") if shutil.which(name) is None]
    if absent:
        return f"{', '.join(absent)} not installed (Debian: slurmctld slurmd slurm-client)"
    if os.geteuid() != 0:
        return "starting slurmd needs root"
    if any((ETC / name).exists() and not (ETC / name).is_symlink() for name in ("slurm.conf", "gres.conf")):
        return f"{ETC} holds a real cluster's configuration"
    return None


@contextmanager
def running(folder: Path) -> Iterator[Path]:
    """Start the cluster with its files in `folder`, wait until both nodes are idle, and stop it at the end."""
    links = _render(folder)
    processes: list[subprocess.Popen] = []
    try:
        for command in (["slurmctld", "-D", "-c"], ["slurmd", "-D", "-N", "c1"], ["slurmd", "-D", "-N", "g1"]):
            log = open(folder / f"{command[0]}.{command[-1]}.out", "w")  # noqa: SIM115
            processes.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT))
        _wait_until_idle(30)
        yield folder
    finally:
        for process in reversed(processes):
            process.terminate()
        for process in reversed(processes):
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
        for link in links:
            link.unlink(missing_ok=True)


def _render(folder: Path) -> list[Path]:
    """Write the configuration and link it into /etc/slurm, where the inner srun of a job looks for it."""
    for name in ("ctld", "slurmd.c1", "slurmd.g1", "dev"):
        (folder / name).mkdir(parents=True)
    (folder / "plugstack.conf").touch()
    first = 26817
    values = {"HOST": socket.gethostname().split(".")[0], "DIR": str(folder), "PORT": first}
    values |= {"PORT_C1": first + 14, "PORT_G1": first + 15}
    text = (HERE / "slurm.conf.in").read_text()
    for name, value in values.items():
        text = text.replace(f"@{name}@", str(value))
    (folder / "slurm.conf").write_text(text)
    # Links to a character device stand in for /dev/nvidia*: slurmd numbers them for CUDA_VISIBLE_DEVICES.
    for index in range(2):
        (folder / "dev" / f"gpu{index}").symlink_to("/dev/null")
    (folder / "gres.conf").write_text(f"NodeName=g1 Name=gpu File={folder}/dev/gpu[0-1]\n")
    ETC.mkdir(exist_ok=True)
    links = []
    for name in ("slurm.conf", "gres.conf"):
        link = ETC / name
        link.unlink(missing_ok=True)
        link.symlink_to(folder / name)
        links.append(link)
    return links


def _wait_until_idle(seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        states = subprocess.run(["sinfo", "-h", "-N", "-o", "%t"], capture_output=True, text=True).stdout.split()
        if states.count("idle") >= 2:
            return
        time.sleep(0.1)
    raise RuntimeError("Slurm did not come up: see the logs in its folder")
