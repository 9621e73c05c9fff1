"""The operations in plain PyTorch: the specification that every other implementation is tested against.

Written for reading, differentiated by autograd. It computes in float32, or in float64 for float64 inputs, whatever
the autocast region around it says, and keeps whole (T, S) and (N, V) matrices, which the fused kernels exist to avoid.
The arguments arrive checked by `chargpt.kernels`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from chargpt.kernels.philox import dropout_keep_mask

RMS_EPS = 1e-6  # added to the mean square of a row before it divides


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    dropout_p: float,
    window: int | None,
    seed: Tensor | None,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale · Q Kᵀ, causally masked), dropped out, times V. Vaswani et al. 2017, equation 1.

    q: (B, H, T, D); k, v: (B, H_kv, S, D); query head h reads key and value head h // (H / H_kv)
    seed: int64 scalar on the CPU that fixes the dropout mask, as `philox.dropout_keep_mask` says; None: no dropout
    returns: O (B, H, T, D) in the dtype of q; lse (B, H, T) in the computing dtype
    """
    B, H, T, D = q.shape
    H_kv, S = k.shape[1], k.shape[2]
    group = H // H_kv
    dtype = _computing_dtype(q)

    with torch.autocast(q.device.type, enabled=False):
        # The query heads that share a key head are stacked into one taller matrix, so K and V are never repeated.
        Q = q.to(dtype).reshape(B * H_kv, group * T, D)
        K = k.to(dtype).reshape(B * H_kv, S, D)
        V = v.to(dtype).reshape(B * H_kv, S, D)
        mask = _causal_mask(T, S, window, dtype, q.device).repeat(group, 1)  # (group · T, S)
        scores = torch.baddbmm(mask, Q, K.mT, alpha=scale)  # (B · H_kv, group · T, S)
        P = scores.softmax(dim=-1)
        if seed is not None:
            keep = dropout_keep_mask(seed, dropout_p, B * H, T, S, q.device).view_as(P)
            P = P * (keep.to(dtype) / (1 - dropout_p))
        out = (P @ V).view(B, H, T, D).to(q.dtype)
        if return_lse:
            return out, scores.logsumexp(dim=-1).view(B, H, T)
    return out


def softmax_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    reduction: str,
) -> Tensor:
    """−log softmax(x)[target] for each row x of the logits, with the options of `chargpt.kernels`.

    logits: (..., V); targets: (...)
    returns: (...) for reduction "none", otherwise a scalar, in the computing dtype
    """
    V = logits.shape[-1]
    with torch.autocast(logits.device.type, enabled=False):
        x = logits.to(_computing_dtype(logits)).reshape(-1, V)  # (N, V)
        y = targets.long().reshape(-1)  # (N)
        valid = y != ignore_index
        if softcap is not None:
            x = softcap * torch.tanh(x / softcap)
        log_p = F.log_softmax(x, dim=-1)
        loss = F.nll_loss(log_p, y, ignore_index=ignore_index, reduction="none")  # (N)
        if label_smoothing > 0:
            loss = (1 - label_smoothing) * loss - label_smoothing * log_p.mean(dim=-1)
        if z_loss > 0:
            loss = loss + z_loss * x.logsumexp(dim=-1) ** 2
        if label_smoothing > 0 or z_loss > 0:
            loss = loss.masked_fill(~valid, 0.0)
        if reduction == "none":
            return loss.view(targets.shape)
        if reduction == "sum":
            return loss.sum()
        return loss.sum() / valid.sum().clamp(min=1)


def add_rms_norm(x: Tensor, y: Tensor | None, *, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """s = x + y, and s / sqrt(mean(s²) + ε) over the last axis. Zhang & Sennrich 2019, arXiv 1910.07467, equation 4.

    x, y: (..., C)
    returns: s in the dtype of x, rounded before it is normalised; the norm in `dtype`, computed in the computing dtype
    """
    with torch.autocast(x.device.type, enabled=False):
        s = x if y is None else (x + y).to(x.dtype)
        return s, _rms_norm(s.to(_computing_dtype(s))).to(dtype)


def qkv_heads(
    qkv: Tensor,
    value_rows: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    n_head: int,
    n_kv_head: int,
    qk_norm: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The heads of a packed projection: q and k normalised and rotated, v with rows added. See `chargpt.kernels`.

    qkv: (B, T, (H + 2 H_kv) D); value_rows: (B, T, H_kv D); cos, sin: (T', D/2)
    returns: q (B, H, T, D), k and v (B, H_kv, T, D) in the dtype of qkv, rounded once
    """
    dtype = _computing_dtype(qkv)
    with torch.autocast(qkv.device.type, enabled=False):
        B, T, channels = qkv.shape
        D = channels // (n_head + 2 * n_kv_head)
        heads = qkv.view(B, T, n_head + 2 * n_kv_head, D).transpose(1, 2)  # (B, H + 2 H_kv, T, D)
        qk, v = heads.split([n_head + n_kv_head, n_kv_head], dim=1)  # type: ignore[no-untyped-call]
        if qk_norm or cos is not None:
            qk = qk.to(dtype)
            if qk_norm:
                qk = _rms_norm(qk)
            if cos is not None and sin is not None:
                qk = _rotate(qk, cos[:T].detach().to(dtype), sin[:T].detach().to(dtype))
            qk = qk.to(qkv.dtype)
        if value_rows is not None:
            v = (v + value_rows.view(B, T, n_kv_head, D).transpose(1, 2)).to(qkv.dtype)
        q, k = qk.split([n_head, n_kv_head], dim=1)
    return q, k, v


def relu_squared(x: Tensor) -> Tensor:
    """max(x, 0)². So et al. 2021, arXiv 2109.08668, section 3."""
    with torch.autocast(x.device.type, enabled=False):
        return F.relu(x).square()


def _rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=RMS_EPS)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Channels i and i + D/2 turned by the angle of their position. Su et al. 2021, arXiv 2104.09864, equation 34."""
    a, b = x.chunk(2, dim=-1)  # (B, H, T, D/2) each
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def _computing_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _causal_mask(T: int, S: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(T, S): 0 where query i may look, that is at keys S − T + i − window < s ≤ S − T + i, and −∞ elsewhere."""
    hidden = torch.full((T, S), -torch.inf, dtype=dtype, device=device)
    future = hidden.triu(S - T + 1)
    return future if window is None else future + hidden.tril(S - T - window)
