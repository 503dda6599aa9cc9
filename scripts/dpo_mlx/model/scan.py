"""Mamba-2's scan in short chunks, for training (Dao & Gu 2024, arXiv:2405.21060, section 6).

mlx-lm's scan uses chunks of 256 positions. Their decay matrices are most of what a block keeps for
the backward pass. It also carries the state between chunks with one small product per position
and head. This scan uses short chunks, and one large product per chunk.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.granitemoehybrid import GraniteMoeHybridMamba2Mixer
from mlx_lm.models.ssm import compute_dt


def scan(x: mx.array, dt: mx.array, a: mx.array, b: mx.array, c: mx.array, chunk: int) -> mx.array:
    """y_t = C_t h_t with h_t = exp(dt_t A) h_(t-1) + dt_t B_t x_t, from h_0 = 0.

    x [L, G, R, P] in G groups of R heads, dt [L, G, R], A [G, R], B and C [L, G, N], all float32.
    The result has the shape of x.
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
    """(outputs [S, G, R, P], state after the chunk [G, N, R P]) of one chunk of S positions.

    Let l be the running sum of the log-decays. Position s <= t contributes to position t with the
    factor exp(l_t - l_s) C_t B_s, and the state before the chunk with exp(l_t) C_t.
    """
    size, groups, heads, width = u.shape
    total = mx.cumsum(log_decay, axis=0)  # [S, G, R]
    by_head = total.transpose(1, 2, 0)  # [G, R, S]
    distance = by_head[..., :, None] - by_head[..., None, :]  # [G, R, S, S]
    causal = mx.tri(size, dtype=mx.bool_)
    decay = mx.exp(mx.where(causal, distance, -mx.inf))
    b, c = b.swapaxes(0, 1), c.swapaxes(0, 1)  # [G, S, N]
    weights = decay * (c @ b.swapaxes(1, 2))[:, None]  # [G, R, S, S]
    y = (weights @ u.transpose(1, 2, 0, 3)).transpose(2, 0, 1, 3)
    decayed = (u * mx.exp(total[-1] - total)[..., None]).swapaxes(0, 1).reshape(groups, size, -1)
    new_state = b.swapaxes(1, 2) @ decayed  # [G, N, R P]
    if state is not None:
        from_state = (c @ state).reshape(groups, size, heads, width).swapaxes(0, 1)
        y = y + mx.exp(total)[..., None] * from_state
        new_state = new_state + mx.repeat(mx.exp(total[-1]), width, axis=-1)[:, None] * state
    return y, new_state


class ChunkedMixer(GraniteMoeHybridMamba2Mixer):
    """Granite's Mamba block. It uses this scan for one sequence without cache and mask."""

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
    """Make every Mamba block of a Granite model use this scan, with `chunk` positions per chunk.

    None keeps mlx-lm's scan. Other models do not change.
    """
    if chunk is None:
        return
    for layer in model.layers:
        mixer = getattr(layer, "mamba", None)
        if type(mixer) is GraniteMoeHybridMamba2Mixer:
            mixer.__class__ = ChunkedMixer
            mixer.chunk = chunk
