"""A 16 GB Mac emulated on any machine: the fixture `virtual_mac`, and stand-ins.

Not emulated: speed, the GPU's memory, and the order in which Metal sums a product. A test that
passes here can still fail there.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models import granite, granitemoehybrid, llama
from mlx_lm.models.ssm import compute_dt

WORKING_SET = 11_450_000_000  # bytes that Metal recommends on a 16 GB M1 or M2
MEMORY = 16 * 2**30

# Head widths of Metal's two attention kernels that are used: for whole sequences, and for up to
# VECTOR queries. For 192 and 256 MLX prefers the unfused operations.
FULL_WIDTHS, VECTOR_WIDTHS, VECTOR = (64, 72, 80, 96, 128), (64, 96, 128, 256), 8
SIMD_WIDTH = 32  # threads that work on one row of Mamba's state

LIMITS = ("set_wired_limit", "set_cache_limit", "set_memory_limit")
# Functions of MLX that give a function which traces gradients, and those that trace at once.
MAKERS, TRACERS = ("value_and_grad", "grad"), ("vjp", "jvp")


@dataclass
class VirtualMac:
    """What a test may read and change.

    `working_set` is in bytes: the test fails when MLX holds more than that beside what it held
    before. `limits` are the arguments of each call of MLX's functions in LIMITS, by name.
    """

    working_set: int = WORKING_SET
    limits: dict[str, list[int]] = field(default_factory=lambda: {name: [] for name in LIMITS})
    held_before: int = 0
    _depth: int = 0

    @property
    def traces_gradients(self) -> bool:
        return self._depth > 0

    @contextmanager
    def tracing(self) -> Iterator[None]:
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1

    def device_info(self, *_: Any) -> dict[str, str | int]:
        """The answer of Metal on an M1."""
        return {
            "device_name": "Apple M1",
            "architecture": "applegpu_g13g",
            "max_buffer_length": MEMORY // 2,
            "max_recommended_working_set_size": self.working_set,
            "memory_size": MEMORY,
            "resource_limit": 499000,
        }

    def require_room(self, held: int) -> None:
        """Fail the test if MLX held more than the working set."""
        beside = held - self.held_before
        if beside > self.working_set:
            pytest.fail(f"MLX held {beside} bytes, the working set is {self.working_set}")


@pytest.fixture
def virtual_mac(monkeypatch: pytest.MonkeyPatch) -> Iterator[VirtualMac]:
    """Make MLX round, offer memory and accept limits like a 16 GB Mac, for one test."""
    mac = VirtualMac(held_before=mx.get_active_memory())
    mx.reset_peak_memory()
    for name in MAKERS:
        monkeypatch.setattr(mx, name, _tracing_later(getattr(mx, name), mac))
    for name in TRACERS:
        monkeypatch.setattr(mx, name, _tracing_now(getattr(mx, name), mac))
    unfused = mx.fast.scaled_dot_product_attention
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", _attention(unfused, mac))
    whole = granitemoehybrid.ssm_update
    monkeypatch.setattr(granitemoehybrid, "ssm_update", _ssm_update(whole))
    for module in (granitemoehybrid, granite, llama):
        monkeypatch.setattr(module, "swiglu", _activation(module.swiglu, mac))
    monkeypatch.setattr(mx, "device_info", mac.device_info)
    for name in LIMITS:
        monkeypatch.setattr(mx, name, _recorded(mac.limits[name]))
    monkeypatch.setattr(mx, "eval", _then_looking(mx.eval, mac))
    monkeypatch.setattr(mx, "reset_peak_memory", _looking_first(mx.reset_peak_memory, mac))
    yield mac
    mac.require_room(mx.get_peak_memory())


def _tracing_later(transform: Callable[..., Any], mac: VirtualMac) -> Callable[..., Any]:
    """`mx.grad` and the like, whose functions tell `mac` while they trace gradients."""

    @wraps(transform)
    def told(*arguments: Any, **options: Any) -> Callable[..., Any]:
        return _tracing_now(transform(*arguments, **options), mac)

    return told


def _tracing_now(function: Callable[..., Any], mac: VirtualMac) -> Callable[..., Any]:
    def told(*arguments: Any, **options: Any) -> Any:
        with mac.tracing():
            return function(*arguments, **options)

    return told


def _attention(unfused: Callable[..., mx.array], mac: VirtualMac) -> Callable[..., mx.array]:
    """Attention as on Metal: the fused kernel, unless gradients are traced or the kernel does not
    take the shapes. MLX's own attention on a CPU is unfused.
    """

    def attention(
        q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None, sinks: Any = None
    ) -> mx.array:
        assert sinks is None, "neither Granite nor Llama has sinks"
        if mac.traces_gradients or not has_kernel(q, k, v, mask):
            return unfused(q, k, v, scale=scale, mask=mask)
        return fused_attention(q, k, v, scale, mask)

    return attention


def _activation(unfused: Callable[..., mx.array], mac: VirtualMac) -> Callable[..., mx.array]:
    """A compiled activation. MLX fuses it into one kernel that may round once, unless gradients are
    traced.
    """

    def activation(*inputs: mx.array) -> mx.array:
        if mac.traces_gradients:
            return unfused(*inputs)
        exact = unfused(*(x.astype(mx.float32) for x in inputs))
        return exact.astype(inputs[0].dtype)

    return activation


def has_kernel(q: mx.array, k: mx.array, v: mx.array, mask: Any) -> bool:
    """Whether Metal has a fused kernel for q [B, H, L, D] and k and v [B, KV, S, D]."""
    heads, queries, width = q.shape[1:]
    shared, keys = k.shape[1:3]
    if v.shape[-1] != width:
        return False
    if queries > VECTOR:
        return width in FULL_WIDTHS and not (isinstance(mask, str) and queries > keys)
    few = queries <= keys and queries * (heads // shared) <= SIMD_WIDTH
    return width in VECTOR_WIDTHS and few


def fused_attention(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: Any) -> mx.array:
    """Attention in float32, rounded once at its end to the dtype of `q`."""
    wide = [x.astype(mx.float32) for x in (q, k, v)]
    if isinstance(mask, mx.array) and mask.dtype != mx.bool_:
        mask = mask.astype(mx.float32)
    queries, keys, values = wide
    groups = q.shape[1] // k.shape[1]
    keys, values = (mx.repeat(x, groups, axis=1) for x in (keys, values))
    scores = scale * queries @ keys.swapaxes(-1, -2)
    if isinstance(mask, str):
        length, total = scores.shape[-2:]
        mask = mx.tri(length, total, total - length, dtype=mx.bool_)
    if mask is not None:
        masked_out = mx.finfo(mx.float32).min
        scores = mx.where(mask, scores, masked_out) if mask.dtype == mx.bool_ else scores + mask
    return (mx.softmax(scores, axis=-1) @ values).astype(q.dtype)


def _ssm_update(whole: Callable[..., Any]) -> Callable[..., Any]:
    """Mamba's step as mlx-lm runs it on Metal: a separate kernel for one token after others."""

    def update(x: mx.array, a: Any, b: Any, c: Any, d: Any, dt: Any, *more: Any) -> Any:
        dt_bias, state, limit, *masks = more
        if x.shape[1] > 1 or state is None:
            return whole(x, a, b, c, d, dt, dt_bias, state, limit, *masks)
        return ssm_step(x, a, b, c, d, dt, dt_bias, state, limit)

    return update


def ssm_step(
    x: mx.array,
    a_log: mx.array,
    b: mx.array,
    c: mx.array,
    d: mx.array,
    dt: mx.array,
    dt_bias: mx.array,
    state: mx.array,
    limit: tuple[float, float],
) -> tuple[mx.array, mx.array]:
    """(y, the next state) for one token, computed in float32, with y rounded once to the dtype of
    `x`.

    x [B, 1, H, P], A, D and dt_bias [H], B and C [B, 1, G, N], dt [B, 1, H], state [B, H, P, N].
    """
    width = b.shape[-1]
    assert width % SIMD_WIDTH == 0, f"Metal's kernel leaves out states: {width} are no times 32"
    heads = x.shape[2] // b.shape[2]
    steps = compute_dt(dt, dt_bias, limit)[:, 0, :, None]  # [B, H, 1]
    inputs, outputs = (mx.repeat(m[:, 0].astype(mx.float32), heads, axis=1) for m in (b, c))
    token = x[:, 0].astype(mx.float32)
    decay = mx.exp(-mx.exp(a_log.astype(mx.float32))[:, None] * steps)
    after = decay[..., None] * state + (steps * token)[..., None] * inputs[:, :, None]
    y = (after * outputs[:, :, None]).sum(axis=-1) + token * d.astype(mx.float32)[:, None]
    return y[:, None].astype(x.dtype), after.astype(state.dtype)


def _recorded(calls: list[int]) -> Callable[[int], int]:
    """Stands in for a function that sets a limit and returns the previous one."""

    def set_limit(limit: int) -> int:
        calls.append(limit)
        return calls[-2] if len(calls) > 1 else 0

    return set_limit


def _then_looking(evaluate: Callable[..., None], mac: VirtualMac) -> Callable[..., None]:
    def watched(*arrays: Any) -> None:
        evaluate(*arrays)
        mac.require_room(mx.get_active_memory())

    return watched


def _looking_first(reset: Callable[[], None], mac: VirtualMac) -> Callable[[], None]:
    def watched() -> None:
        mac.require_room(mx.get_peak_memory())
        reset()

    return watched


def in_bfloat16(source: Path, folder: Path) -> Path:
    """A copy of a model folder with bfloat16 weights, at `folder`."""
    shutil.copytree(source, folder)
    for path in folder.glob("*.safetensors"):
        weights: Any = mx.load(str(path))
        narrow = {name: weight.astype(mx.bfloat16) for name, weight in weights.items()}
        mx.eval(narrow)  # now: they are still read from the file that is written
        mx.save_safetensors(str(path), narrow, metadata={"format": "mlx"})
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**about, "torch_dtype": "bfloat16"}))
    return folder


# What the commands say on a 16 GB M1; None fails, as an unknown name does.
ANSWERS: dict[str, str | None] = {
    "uname": "Darwin",
    "uname -s": "Darwin",
    "uname -m": "arm64",
    "uname -sm": "Darwin arm64",
    "sw_vers -productVersion": "15.3.1",
    "sysctl -n hw.memsize": str(MEMORY),
    "sysctl -n machdep.cpu.brand_string": "Apple M1",
    "sysctl -n sysctl.proc_translated": "0",
    "sysctl -in sysctl.proc_translated": "0",
}

# As the real one: it stays until the process of -w ends, or the command that it is given does.
CAFFEINATE = """#!/bin/sh
echo "$*" >> "$(dirname "$0")/caffeinate.arguments"
process=""
while [ $# -gt 0 ]; do
  case $1 in
    -w) process=$2; shift 2 ;;
    -t) shift 2 ;;
    -*) shift ;;
    *) exec "$@" ;;
  esac
done
while [ -n "$process" ] && kill -0 "$process" 2> /dev/null; do sleep 0.1; done
"""


def stand_ins(folder: Path, **answers: str | None) -> Path:
    """A folder to put in front of PATH, with macOS's `uname`, `sw_vers`, `sysctl`, `caffeinate`.

    `answers` win over ANSWERS: stand_ins(folder, **{"uname -m": "x86_64"}). `caffeinate` writes
    its arguments to `folder`/caffeinate.arguments, a line per call.
    """
    folder.mkdir(parents=True, exist_ok=True)
    by_program: dict[str, dict[str, str | None]] = {}
    for command, answer in {**ANSWERS, **answers}.items():
        program, _, arguments = command.partition(" ")
        by_program.setdefault(program, {})[arguments] = answer
    for program, answer_by_arguments in by_program.items():
        _write_script(folder / program, _script(program, answer_by_arguments))
    _write_script(folder / "caffeinate", CAFFEINATE)
    return folder


def _script(program: str, answers: dict[str, str | None]) -> str:
    cases = "".join(
        f"  {shlex.quote(arguments)}) echo {shlex.quote(answer)} ;;\n"
        for arguments, answer in answers.items()
        if answer is not None
    )
    unknown = f'  *) echo "{program}: no answer to: $*" >&2; exit 1 ;;\n'
    return f'#!/bin/sh\ncase "$*" in\n{cases}{unknown}esac\n'


def _write_script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)
