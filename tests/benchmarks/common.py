"""What the benchmarks share: measured processes, the peers' environments, tables and files.

Nothing here imports mlx, torch or this project: the workers of peers use it in their environments.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DATA = ROOT / "data/benchmarks"  # git-ignored
sys.path += [str(ROOT / "scripts"), str(ROOT / "tests")]

Values = dict[str, Any]

# LoRA and loss of every run, ours or a peer's.
LORA_RANK, LORA_SCALE = 8, 20.0
LEARNING_RATE, BETA = 1e-5, 0.1


def start(main: Callable[[], None], worker: Callable[[Values], Values]) -> None:
    """Run `main`, or `worker` when `measure` started this script as a measured process."""
    if sys.argv[1:2] != ["--worker"]:
        return main()
    task, answer = map(Path, sys.argv[2:])
    result = worker(json.loads(task.read_text()))
    answer.write_text(json.dumps({"peak_rss": peak_rss(), **result}))


def measure(
    script: str,
    task: Values,
    python: str = sys.executable,
    mlx: bool = True,
    threads: int | None = None,
    more: dict[str, str] | None = None,
    limit: float | None = None,
    log: Path | None = None,
) -> Values:
    """What the worker of `script` returns for `task`, in a fresh process with a peak of its own.

    `threads` are its BLAS's; None is one per core; `more` is of its environment. The process may
    take what memory is free now, so that one that takes more fails alone: {"failed": why}. It is
    killed after `limit` seconds. What it prints is appended to the file `log`.
    """
    with tempfile.TemporaryDirectory() as folder:
        asked, answer = Path(folder, "task.json"), Path(folder, "answer.json")
        asked.write_text(json.dumps(task))
        output = Path(folder, "output.txt")
        with output.open("w") as file:
            process = subprocess.Popen(
                [python, str(Path(__file__).parent / script), "--worker", str(asked), str(answer)],
                env={**environment(mlx, threads), **(more or {})},
                stdout=file,
                stderr=subprocess.STDOUT,
                preexec_fn=limit_memory,
            )
            end = _end_of(process, limit)
        text = output.read_text(errors="replace")
        if log is not None:
            with log.open("a") as file:
                file.write(text)
        if answer.is_file():
            return json.loads(answer.read_text())
    lines = text.splitlines()
    print("\n".join(lines[-12:]), file=sys.stderr)
    return {"failed": f"{end}: {lines[-1][:200] if lines else ''}"}


def _end_of(process: subprocess.Popen[bytes], limit: float | None) -> str:
    """How a process ended; it is killed after `limit` seconds."""
    try:
        return f"exit code {process.wait(limit)}"
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return f"killed after {limit:.0f} s"


def environment(mlx: bool, threads: int | None = None) -> dict[str, str]:
    """OpenBLAS goes before MLX on Linux; torch brings its own and becomes slower by another's."""
    env = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    env.pop("LD_PRELOAD", None)
    if mlx and (library := openblas()):
        env["LD_PRELOAD"] = library
    if threads is not None:
        env["OPENBLAS_NUM_THREADS"] = str(threads)
    return env


def openblas() -> str:
    """As scripts/environment.sh finds it; "" where there is none or none is needed."""
    if platform.system() != "Linux" or not shutil.which("ldconfig"):
        return ""
    known = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True).stdout
    return "libopenblas.so.0" if "libopenblas.so.0 " in known else ""


def limit_memory() -> None:
    """On a CPU only: a GPU's driver reserves addresses beyond what it uses."""
    info = Path("/proc/meminfo")
    if info.is_file() and not Path("/dev/nvidiactl").exists():
        available = next(r for r in info.read_text().splitlines() if r.startswith("MemAvailable"))
        free = int(available.split()[1]) * 1024
        resource.setrlimit(resource.RLIMIT_DATA, (free, free))


def peak_rss() -> int:
    """Bytes this process held at most: ru_maxrss, which on Linux would count the parent's too."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(r for r in status.read_text().splitlines() if r.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def venv(name: str, requirements: list[str]) -> str:
    """The Python of a virtual environment with these packages, made where it is not there yet."""
    folder = DATA / "venvs" / name
    python, stamp = str(folder / "bin/python"), folder / "requirements.txt"
    if not stamp.is_file() or stamp.read_text().split() != requirements:
        print(f"installing {' '.join(requirements)}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        pip = [python, "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
        subprocess.run([*pip, *requirements], check=True)
        stamp.write_text("\n".join(requirements))
    return python


def pins(*prefixes: str) -> list[str]:
    """name==version of the installed packages whose names begin so: peers get the same."""
    found = {f"{d.name}=={d.version}" for d in distributions() if d.name.startswith(prefixes)}
    return sorted(found)


def parser(description: str | None, name: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--out", type=Path, default=DATA / f"{name}.json", help="the JSON file")
    return made


def numbers(text: str) -> list[int]:
    """An option's value like 4,7,10."""
    return [int(part) for part in text.split(",")]


def table(title: str, rows: list[Values]) -> None:
    """Print rows of one set of keys under their names."""
    columns = list(rows[0]) if rows else []
    cells = [columns, *([cell(row[c]) for c in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    print(f"\n{title}")
    for line in cells:
        both = zip(line, widths, strict=True)
        print("  ".join(f"{c:<{w}}" if i == 0 else f"{c:>{w}}" for i, (c, w) in enumerate(both)))
    sys.stdout.flush()


def cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)


def gigabytes(count: float | None) -> float | None:
    return None if count is None else round(count / 1e9, 3)


def _plain(value: Any) -> str:
    """An option without the machine's folders."""
    return Path(value).name if isinstance(value, Path) else str(value)


def save(args: argparse.Namespace, results: Values) -> None:
    """Write the results with their options and versions, and print the file's name."""
    write(args, results)
    print(f"\nwritten: {args.out.name}")


def write(args: argparse.Namespace, results: Values) -> None:
    about = {
        "options": {k: _plain(v) for k, v in vars(args).items() if k != "out"},
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "openblas": bool(openblas()),
        "versions": pins("mlx", "transformers", "numpy"),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({**about, **results}, indent=2) + "\n")
