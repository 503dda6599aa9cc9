#!/usr/bin/env python3
"""Kill the stages at random moments, start them again, and compare with an undisturbed run.

    python tests/chaos/run.py [--kills 50] [--seed 0] [--signal KILL|TERM|INT] [--foreign]

A tiny model goes through 06, 10, 11 and 12, as processes, again and again until there were so many
kills; every round must end in the same bytes as the undisturbed one. Then with a full disk (a small
tmpfs, where it may be mounted) and with two runs at once. With --foreign every folder is filled
first with other people's files and links, of which every byte must stay. Exits 1 on any difference.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent / "scripts")]

import foreign  # noqa: E402
import tiny  # noqa: E402
import yaml  # noqa: E402
from dpo_mlx.files import jsonl  # noqa: E402
from dpo_mlx.files.lock import HEADER  # noqa: E402
from dpo_mlx.files.ownership import MANIFEST  # noqa: E402
from dpo_mlx.files.run_folder import LOCK  # noqa: E402
from runs import IN_FOLDER, NO_LIMITS, determined  # noqa: E402

SCRIPTS = {
    path.name[:2]: path
    for path in sorted((TESTS.parent / "scripts").glob("phase*/*.py"))
    if not path.name.startswith(("01", "02", "05", "14"))
}
TMPFS_BYTES = 100_000_000

SETTINGS: dict[str, Any] = {
    **IN_FOLDER,
    "generation": {"max_tokens": 12, "batch_size": 4},
    "sft": {"epochs": 1, "learning_rate": 1e-3},
    "train": {
        "learning_rate": 1e-3,
        "epochs": 2,
        "grad_accumulation": 2,
        "eval_every": 3,
        "eval_questions": 2,
    },
    "guard": {"enabled": False},
    "smoke": {"questions": 2, **NO_LIMITS},
    "fuse": {"min_margin_kept": 0},
}


class Stage:
    """A stage as a process in the folder of a round."""

    def __init__(self, name: str, folder: Path) -> None:
        self.started = time.monotonic()
        self.folder = folder
        # Beside the folder, whose disk may be full.
        self.errors = folder.with_name(f"{folder.name}-errors-{name}.txt")
        self.lock = folder / "run" / LOCK
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, str(SCRIPTS[name]), "--config", "c.yaml"],
                cwd=folder,
                stdout=subprocess.DEVNULL,
                stderr=errors,
            )

    def wait_for_start(self) -> float:
        """Seconds until it holds its run's folder, or has ended."""
        mine = f"{HEADER}process {self.process.pid} "
        while self.process.poll() is None:
            if self.lock.exists() and self.lock.read_text().startswith(mine):
                break
            time.sleep(0.005)
        return time.monotonic() - self.started

    def ends_within(self, seconds: float) -> bool:
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def finish(self) -> tuple[int, str]:
        """(exit code, the lines on stderr that are faults)."""
        code = self.process.wait()
        lines = re.split(r"[\r\n]+", self.errors.read_text())
        said = [line for line in lines if line.startswith(("error: ", "Traceback", "stopped by"))]
        return code, "\n".join(said)


def make_round(folder: Path, model: Path, foreign_files: bool = False) -> Path:
    """A folder with a config and its source, and other people's files if wanted."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"question": f"Why is {i}?", "answer": f"**So.** It is {i}."} for i in range(20)]
    jsonl.write(folder / "source.jsonl", rows)
    (folder / "c.yaml").write_text(yaml.safe_dump({**SETTINGS, "model": str(model)}))
    if foreign_files:
        foreign.put_neighbours(folder)
    return folder


def run_calmly(folder: Path) -> dict[str, float]:
    """Every stage undisturbed; the seconds that each one works once it has its folder."""
    seconds = {}
    for name in SCRIPTS:
        stage = Stage(name, folder)
        before = stage.wait_for_start()
        code, said = stage.finish()
        require(code == 0, f"stage {name} alone exits {code}: {said}")
        seconds[name] = time.monotonic() - stage.started - before
    return seconds


def disturb(
    folder: Path,
    seconds: dict[str, float],
    chance: random.Random,
    hit: Callable[[Stage], None],
    left: Counter[str],
) -> int:
    """Each stage, hit at a random moment while there are hits `left`, until it comes to its end;
    how often one was started again.
    """
    restarts = 0
    for name in SCRIPTS:
        while True:
            stage = Stage(name, folder)
            if left["all"] > 0:
                stage.wait_for_start()
                if not stage.ends_within(chance.uniform(0, seconds[name])):
                    hit(stage)
                    left["all"] -= 1
                    left[name] += 1
            code, said = stage.finish()
            require("Traceback" not in said, f"stage {name} prints a traceback: {stage.errors}")
            if code == 0:
                break
            restarts += 1
            require(restarts < 1000, f"stage {name} does not come to its end: {said}")
    return restarts


def send(number: signal.Signals) -> Callable[[Stage], None]:
    def hit(stage: Stage) -> None:
        stage.process.send_signal(number)
        code, said = stage.finish()
        # Outside of the stage proper, while Python starts or ends, a signal kills as any process (a
        # shell says 128 + number then, too); after the last safe point it changes nothing.
        expected = (-number, 0) if number == signal.SIGKILL else (128 + number, -number, 0)
        require(code in expected, f"{number.name}: exit code {code}, none of {expected}: {said}")
        if code > 0:
            require("the same command goes on" in said, f"{number.name} is not explained: {said}")

    return hit


def fill_disk(stage: Stage) -> None:
    """Until the stage fails or ends; then the space is free again."""
    ballast = stage.folder / "ballast"
    with ballast.open("wb", buffering=0) as file:
        while stage.process.poll() is None:
            try:
                file.write(b"x" * 65536)
            except OSError:
                time.sleep(0.02)
    code, said = stage.finish()
    ballast.unlink()
    if code:
        require(
            said.count("\n") == 0 and "disk" in said, f"a full disk is said in one line: {said}"
        )


def compare(found: Path, expected: Path) -> int:
    """How many files were compared; SystemExit when one differs, or is too many."""
    require(
        foreign.neighbours(found) == foreign.neighbours(expected),
        f"{found}: a file that is not ours is not what it was",
    )
    names = outputs(expected)
    require(outputs(found) == names, f"other files: {set(outputs(found)) ^ set(names)}")
    for name in names:
        require(
            content(found / name) == content(expected / name),
            f"{found / name} differs from a calm run's",
        )
    rows = jsonl.read_whole_lines(found / "run/metrics.jsonl")
    keys = [(row["phase"], row["iteration"], "eval_loss" in row) for row in rows]
    require(len(keys) == len(set(keys)), f"{found}: a row of metrics.jsonl is there twice")
    return len(names)


def outputs(folder: Path) -> list[str]:
    """Every file of a run but locks, stamps, which know when files were made, and manifests, which
    also know what was there before.
    """
    paths = (path for path in (folder / "run").rglob("*") if path.is_file())
    names = (path.relative_to(folder).as_posix() for path in paths if path.name != MANIFEST)
    return sorted(n for n in names if "/stamps/" not in n and not n.endswith(".lock"))


def content(path: Path) -> Any:
    """What must be equal: all but speed and memory."""
    if path.name == "metrics.jsonl":
        return determined(path)
    if path.name == "report.html":
        return re.sub(r"[\d.–]+ (GB|tokens/s)</td>", "", path.read_text())
    return path.read_bytes()


def storm(
    work: Path, model: Path, calm: Path, seconds: dict[str, float], options: argparse.Namespace
) -> None:
    number = signal.Signals[f"SIG{options.signal}"]
    chance, left = random.Random(options.seed), Counter({"all": options.kills})
    rounds = restarts = files = 0
    while left["all"] > 0:
        rounds += 1
        folder = make_round(work / f"round{rounds}", model, options.foreign)
        restarts += disturb(folder, seconds, chance, send(number), left)
        files = compare(folder, calm)
        print(f"{number.name}: round {rounds} is equal, {left['all']} to go", flush=True)
    per_stage = ", ".join(f"{left[name]} in {name}" for name in SCRIPTS)
    print(
        f"{number.name}: {options.kills} kills ({per_stage}), {restarts} restarts, {rounds} "
        f"rounds, {files} files each: all equal to the undisturbed run's"
    )


def full_disk(
    work: Path, model: Path, calm: Path, seconds: dict[str, float], options: argparse.Namespace
) -> None:
    folder = work / "full"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={TMPFS_BYTES}", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        print("full disk: left out, no tmpfs can be mounted here")
        return
    try:
        make_round(folder, model, options.foreign)
        left = Counter({"all": 8})
        restarts = disturb(folder, seconds, random.Random(options.seed), fill_disk, left)
        files = compare(folder, calm)
    finally:
        subprocess.run(["umount", str(folder)], check=True)
    print(f"full disk: 8 times, {restarts} restarts, {files} files equal")


def two_at_once(work: Path, model: Path, calm: Path, options: argparse.Namespace) -> None:
    folder = make_round(work / "two", model, options.foreign)
    refused = 0
    for name in SCRIPTS:
        first = Stage(name, folder)
        first.wait_for_start()
        second = subprocess.run(
            [sys.executable, str(SCRIPTS[name]), "--config", "c.yaml"],
            cwd=folder,
            capture_output=True,
            text=True,
        )
        holder = f"in use by process {first.process.pid} on "
        told = second.returncode == 1 and holder in second.stderr
        require(told or second.returncode == 0, f"stage {name} twice: {second.stderr}")
        refused += told
        code, said = first.finish()
        require(code == 0, f"stage {name} is disturbed by a second one: {said}")
    files = compare(folder, calm)
    print(f"two at once: {refused} of {len(SCRIPTS)} told who holds it, {files} files equal")


def require(condition: bool, otherwise: str) -> None:
    if not condition:
        sys.exit(f"chaos: {otherwise}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signal", choices=["KILL", "TERM", "INT"], default="KILL")
    parser.add_argument("--only-kills", action="store_true", help="no full disk, no two at once")
    parser.add_argument("--foreign", action="store_true", help="other people's files everywhere")
    options = parser.parse_args()
    os.environ["PYTHONFAULTHANDLER"] = "1"
    with TemporaryDirectory(prefix="chaos-") as name:
        work = Path(name)
        model = tiny.folder(work / "model", "llama")
        calm = make_round(work / "calm", model, options.foreign)
        seconds = run_calmly(calm)
        print("undisturbed: " + ", ".join(f"{n} {s:.1f} s" for n, s in seconds.items()), flush=True)
        storm(work, model, calm, seconds, options)
        if not options.only_kills:
            full_disk(work, model, calm, seconds, options)
            two_at_once(work, model, calm, options)


if __name__ == "__main__":
    main()
