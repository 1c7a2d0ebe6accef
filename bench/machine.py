"""What a measurement was made on and with: numbers mean nothing without it."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

import torch


def cpu_model() -> str:
    """The processor's name; family and model where the name says little."""
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or "unknown"
    fields = dict(re.findall(r"^([^\t\n]+?)\s*:\s*(.*)$", info.split("\n\n")[0], re.MULTILINE))
    name = fields.get("model name", platform.machine())
    return f"{name} (family {fields.get('cpu family', '?')}, model {fields.get('model', '?')})"


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit(root: Path = Path(__file__).parent) -> str | None:
    """The commit that was measured, with a mark if files differ from it, results apart."""

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)

    try:
        name = git("describe", "--always", "--abbrev=10", "--exclude=*")
    except OSError:
        return None
    if name.returncode != 0:
        return None
    same = git("diff", "--quiet", "HEAD", "--", ":/", ":(exclude,top)bench/results")
    return name.stdout.strip() + ("-dirty" if same.returncode != 0 else "")


class OtherLoad:
    """How much of the machine processes other than ours took since this object was made."""

    def __init__(self) -> None:
        self.start = self.now()
        self.elsewhere = 0.0

    def own(self, seconds: float) -> None:
        """Counts the processor's seconds of another process as ours."""
        self.elsewhere += seconds

    @staticmethod
    def now() -> tuple[float, float, float]:
        """Seconds since the start of the machine: spent by all, spent busy, spent by us."""
        ticks = os.sysconf("SC_CLK_TCK")
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        values = [int(field) / ticks for field in fields]
        idle = values[3] + values[4]  # idle, and waiting for a disk
        own = os.times()
        return sum(values), sum(values) - idle, own.user + own.system

    def share(self) -> float:
        """0 where we had the machine for ourselves, 1 where others had all of it."""
        total, busy, own = (b - a for a, b in zip(self.start, self.now(), strict=True))
        return max(0.0, (busy - own - self.elsewhere) / total) if total else 0.0


def describe(threads: int, peers: list[str]) -> dict[str, str]:
    """The header of a report, in the order it is shown."""
    import fusedrnn  # here, as bench.cuda needs this file where the extension is not built yet

    versions = {"torch": torch.__version__, "fusedrnn": fusedrnn.__version__}
    versions |= {peer: version(peer) or "?" for peer in peers}
    isas = " ".join(fusedrnn.cpu_isas())
    release = platform.release().split("-")[0]
    header = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": cpu_model(),
        "cores": f"{len(os.sched_getaffinity(0))} usable",
        "threads": str(threads),
        "isa": f"fusedrnn {fusedrnn._C.get_cpu_isa()} (of {isas}), "
        f"torch {torch.backends.cpu.get_cpu_capability()}",
        "system": f"{platform.system()} {release}, Python {platform.python_version()}",
        "versions": ", ".join(f"{name} {v}" for name, v in versions.items()),
        "commit": commit() or "",
    }
    return {key: value for key, value in header.items() if value}
