"""Mamba-2's scan in short chunks, for training (Dao & Gu 2024, arXiv:2405.21060, section 6).

mlx-lm's scan works on chunks of 256 positions, whose decay matrices are most of what a block keeps
for the backward pass, and carries the state from chunk to chunk by one small product a position
and head. Here chunks are short, and the state is carried by one large product a chunk.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.granitemoehybrid import GraniteMoeHybridMamba2Mixer
from mlx_lm.models.ssm import compute_dt


def scan(x: mx.array, dt: mx.array, a: mx.array, b: mx.array, c: mx.array, chunk: int) -> mx.array:
    """y_t = C_t h_t with h_t = exp(dt_t A) h_(t-1) + dt_t B_t x_t, from h_0 = 0.

    x [L, G, R, P] in G groups of R heads, dt [L, G, R], A [G, R], B and C [L, G, N]; the result
    has the shape of x. All in float32.
    """
    log_decay, u = dt * a, dt[..., None] * x
    outputs, state = [], None
    for start in range(0, x.shape[0], chunk):
        part = slice(start, start + chunk)
        y, state = _chunk(log_decay[part], u[part], b[part], c[part], state)
        outputs.append(y)
    return mx.concatenate(outputs)


def _chunk(
    log_decay: mx.array, u: mx.array, b: mx.array, c: mx.array, state: mx.array | None
) -> tuple[mx.array, mx.array]:
    """One chunk of S positions: its outputs [S, G, R, P], and the state [G, N, R P] after it.

    With the running sum l of the log-decays, position t hears position s <= t through
    exp(l_t - l_s) C_t B_s, and the state before the chunk through exp(l_t) C_t.
    """
    size, groups, heads, width = u.shape
    total = mx.cumsum(log_decay, axis=0)  # [S, G, R]
    by_head = total.transpose(1, 2, 0)  # [G, R, S]
    distance = by_head[..., :, None] - by_head[..., None, :]  # [G, R, S, S]
    causal = mx.tri(size, dtype=mx.bool_)
    decay = mx.exp(mx.where(causal, distance, -mx.inf))
    b, c = b.swapaxes(0, 1), c.swapaxes(0, 1)  # [G, S, N]
    heard = decay * (c @ b.swapaxes(1, 2))[:, None]
    y = (heard @ u.transpose(1, 2, 0, 3)).transpose(2, 0, 1, 3)
    left = (u * mx.exp(total[-1] - total)[..., None]).swapaxes(0, 1).reshape(groups, size, -1)
    after = b.swapaxes(1, 2) @ left  # [G, N, R P]
    if state is not None:
        carried = (c @ state).reshape(groups, size, heads, width).swapaxes(0, 1)
        y = y + mx.exp(total)[..., None] * carried
        after = after + mx.repeat(mx.exp(total[-1]), width, axis=-1)[:, None] * state
    return y, after


class ChunkedMixer(GraniteMoeHybridMamba2Mixer):
    """Granite's Mamba block with this scan where there is neither cache nor mask nor batch."""

    chunk: int

    def _ssm(
        self,
        hidden_states: mx.array,
        B: mx.array,
        C: mx.array,
        dt: mx.array,
        cache: Any,
        mask: mx.array | None,
    ) -> mx.array:
        batch, length, _ = hidden_states.shape
        if cache is not None or mask is not None or batch != 1:
            return super()._ssm(hidden_states, B, C, dt, cache, mask)
        groups, heads = self.n_groups, self.heads_per_group
        x = hidden_states.reshape(length, groups, heads, self.head_dim).astype(mx.float32)
        steps = compute_dt(dt[0], self.dt_bias, self.time_step_limit)
        y = scan(
            x,
            steps.reshape(length, groups, heads),
            -mx.exp(self.A_log.astype(mx.float32)).reshape(groups, heads),
            B.reshape(length, groups, -1).astype(mx.float32),
            C.reshape(length, groups, -1).astype(mx.float32),
            self.chunk,
        )
        y = y + x * self.D.reshape(groups, heads, 1)
        return y.reshape(1, length, -1).astype(hidden_states.dtype)


def use_chunks(model: nn.Module, chunk: int | None) -> None:
    """Give every Mamba block of a Granite this scan, in chunks of so many positions.

    None leaves the scan to mlx-lm; models of another kind are left as they are.
    """
    if chunk is None:
        return
    for layer in model.layers:
        mixer = getattr(layer, "mamba", None)
        if type(mixer) is GraniteMoeHybridMamba2Mixer:
            mixer.__class__ = ChunkedMixer
            mixer.chunk = chunk
