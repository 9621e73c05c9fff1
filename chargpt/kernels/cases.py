"""The inputs that attention and cross-entropy are tested on, whoever computes them.

One list for the project's tests, for `make gpu`, and for `chargpt info --check` on anybody's device.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionCase:
    name: str
    B: int = 2
    H: int = 2
    T: int = 7
    D: int = 8
    S: int | None = None  # None: T
    H_kv: int | None = None  # None: H
    packed: bool = False  # q, k and v are strided views of one (B, T, 3, H, D) projection
    spread: float = 1.0  # standard deviation of q and k
    options: dict[str, Any] = field(default_factory=dict)

    def inputs(
        self, dtype: torch.dtype = torch.float64, draw: int = 0, device: str = "cpu"
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v as leaves that require gradients, or views of one that does; the same on every device."""
        generator = torch.Generator().manual_seed(case_seed(self.name) + draw)
        S, H_kv = self.S or self.T, self.H_kv or self.H
        if self.packed:
            qkv = torch.randn(self.B, self.T, 3, self.H, self.D, generator=generator, dtype=torch.float64)
            qkv = (self.spread * qkv).to(device, dtype).requires_grad_()
            q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
            return q, k, v
        shapes = [(self.B, self.H, self.T, self.D), (self.B, H_kv, S, self.D), (self.B, H_kv, S, self.D)]
        q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
        return tuple(x.to(device, dtype).requires_grad_() for x in (self.spread * q, self.spread * k, v))  # type: ignore[return-value]


# T and D: one, two, odd, and on both sides of a power of two, where tiles end. D = 31 does not fill whole vectors.
ATTENTION_CASES = [
    *(AttentionCase(f"T{T}", T=T) for T in (1, 2, 7, 63, 64, 65)),
    *(AttentionCase(f"T{T}", B=1, T=T) for T in (255, 256)),
    AttentionCase("T1000", B=1, H=1, T=1000),
    *(AttentionCase(f"D{D}", D=D, T=9) for D in (1, 8, 16, 31, 32, 64, 80, 128, 256)),
    AttentionCase("one_query_many_keys", T=1, S=70),
    AttentionCase("more_keys_than_queries", T=5, S=66, D=32),
    AttentionCase("grouped_heads", H=6, H_kv=2, T=33),
    AttentionCase("one_kv_head", H=4, H_kv=1, T=17, S=20),
    AttentionCase("window_1", T=65, options={"window": 1}),
    AttentionCase("window_16", T=65, D=32, options={"window": 16}),
    AttentionCase("window_over_all", T=9, options={"window": 100}),
    AttentionCase("window_more_keys_grouped", H=4, H_kv=2, T=7, S=65, options={"window": 3}),
    AttentionCase("scale", T=33, options={"scale": 0.3}),
    AttentionCase("negative_scale", T=33, options={"scale": -1.0}),
    AttentionCase("dropout", T=33, D=32, options={"dropout_p": 0.2}),
    AttentionCase("dropout_more_keys_window_grouped", H=4, H_kv=2, T=7, S=66, options={"dropout_p": 0.7, "window": 9}),
    AttentionCase("packed", T=64, D=32, packed=True),
    AttentionCase("packed_dropout", T=65, D=31, packed=True, options={"dropout_p": 0.1}),
    AttentionCase("sharp", T=64, D=32, spread=8.0),
    AttentionCase("no_batch", B=0),
    AttentionCase("no_queries", T=0, S=3),
    AttentionCase("nothing", T=0),
]
# Not for the GPU's 16-bit kernels: they take lse to the power of 2 and back, which scores of 10⁸ do not survive.
HUGE_ATTENTION = AttentionCase("huge", T=65, D=32, spread=1e4)


@dataclass(frozen=True)
class CrossEntropyCase:
    name: str
    shape: tuple[int, ...] = (6,)
    V: int = 65
    spread: float = 3.0  # standard deviation of the logits
    ignored: float = 0.0  # share of ignored rows
    minus_inf: bool = False  # some logits, none of them a target's, are −inf
    strided: bool = False  # every other column of a wider tensor
    sliced: bool = False  # the first columns of a wider tensor: whole rows, with gaps between them
    options: dict[str, Any] = field(default_factory=dict)

    def inputs(self, dtype: torch.dtype = torch.float64, draw: int = 0, device: str = "cpu") -> tuple[Tensor, Tensor]:
        """logits as a leaf that requires gradients (or a view of one), and targets; the same on every device."""
        generator = torch.Generator().manual_seed(case_seed(self.name) + draw)
        logits = self.spread * torch.randn(*self.shape, self.V, generator=generator, dtype=torch.float64)
        targets = torch.randint(self.V, self.shape, generator=generator)
        if self.minus_inf:
            hidden = torch.rand(logits.shape, generator=generator) < 0.3
            logits = logits.masked_fill(hidden.scatter(-1, targets[..., None], False), -torch.inf)
        rows = torch.rand(self.shape, generator=generator)
        targets = targets.masked_fill(rows < self.ignored, self.options.get("ignore_index", -100)).to(device)
        if self.strided:
            wide = torch.zeros(*self.shape, 2 * self.V, dtype=dtype, device=device)
            wide[..., ::2] = logits
            return wide.requires_grad_()[..., ::2], targets
        if self.sliced:
            wide = torch.zeros(*self.shape, self.V + 7, dtype=dtype, device=device)
            wide[..., : self.V] = logits
            return wide.requires_grad_()[..., : self.V], targets
        return logits.to(device, dtype).requires_grad_(), targets


ALL_OPTIONS = {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 5.0}

# V: one, two, tiny Shakespeare's 65, on both sides of whole vectors (16, 128), GPT-2's odd 50257 and its padded 50304.
# 17 rows are one more than the lanes of the widest vector.
CROSS_ENTROPY_CASES = [
    *(CrossEntropyCase(f"V{V}", V=V) for V in (1, 2, 15, 16, 17, 64, 65, 127, 128, 129, 1000)),
    *(CrossEntropyCase(f"V{V}", shape=(2,), V=V) for V in (50257, 50304)),
    *(CrossEntropyCase(f"everything_V{V}", shape=(17,), V=V, ignored=0.2, options=ALL_OPTIONS) for V in (1, 2, 65)),
    CrossEntropyCase("everything_V50257", shape=(3,), V=50257, ignored=0.3, options=ALL_OPTIONS),
    CrossEntropyCase("all_but_softcap", shape=(17,), ignored=0.2, options={"label_smoothing": 0.1, "z_loss": 0.01}),
    CrossEntropyCase("all_but_softcap_V1000", V=1000, options={"label_smoothing": 0.1, "z_loss": 0.01}),
    CrossEntropyCase("rows_15", shape=(15,)),
    CrossEntropyCase("rows_17", shape=(17,), ignored=0.3),
    CrossEntropyCase("batch_and_time", shape=(3, 5)),
    CrossEntropyCase("one_row_no_dimension", shape=()),
    CrossEntropyCase("some_ignored", shape=(40,), ignored=0.4),
    CrossEntropyCase("some_ignored_none", shape=(5, 8), ignored=0.4, options={"reduction": "none"}),
    CrossEntropyCase("ignore_index_in_range", shape=(40,), V=5, ignored=0.3, options={"ignore_index": 2}),
    CrossEntropyCase("all_ignored", ignored=1.0),
    CrossEntropyCase("all_ignored_everything_on", ignored=1.0, options={"label_smoothing": 0.1, "z_loss": 0.1}),
    CrossEntropyCase("sum", shape=(4, 7), options={"reduction": "sum"}),
    CrossEntropyCase("smoothing", ignored=0.3, options={"label_smoothing": 0.1}),
    CrossEntropyCase("smoothing_1", options={"label_smoothing": 1.0}),
    CrossEntropyCase("z_loss", ignored=0.3, options={"z_loss": 0.01}),
    CrossEntropyCase("softcap", options={"softcap": 5.0}),
    CrossEntropyCase(
        "everything",
        shape=(4, 9),
        V=1000,
        ignored=0.3,
        options={"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 5.0, "reduction": "none"},
    ),
    CrossEntropyCase("huge", spread=1e4),
    CrossEntropyCase("huge_none", spread=1e4, options={"reduction": "none"}),
    CrossEntropyCase("huge_V1000", V=1000, spread=1e4),
    CrossEntropyCase("huge_softcap", spread=1e4, options={"softcap": 30.0}),
    CrossEntropyCase("minus_inf", minus_inf=True),
    CrossEntropyCase("minus_inf_V1000_none", V=1000, minus_inf=True, options={"reduction": "none"}),
    CrossEntropyCase("minus_inf_V2", shape=(20,), V=2, minus_inf=True),
    CrossEntropyCase("strided", shape=(4, 5), strided=True),
    CrossEntropyCase("sliced", shape=(20,), sliced=True),
    CrossEntropyCase("sliced_batch_V1000", shape=(4, 5), V=1000, sliced=True),
    CrossEntropyCase("no_rows", shape=(0,)),
    CrossEntropyCase("no_rows_none", shape=(2, 0), options={"reduction": "none"}),
]


def case_seed(name: str) -> int:
    """Of the numbers that a case draws."""
    seed = 0
    for c in reversed(name):
        seed = (31 * seed + ord(c)) % 2**31
    return seed
