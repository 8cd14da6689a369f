"""Layers that read the same tensor, found by their names: their Ds share one product at inference.

q, k and v of a self-attention, and gate and up of a gated MLP, are given the very same tensor. The
first of them multiplies it by all their Ds at once, and the others take their parts. Whether they
are kin is read off their names, once, so that the first call rounds as every later one; whether
they were really given the same tensor is checked at every call. (While tasks are trained, kin are
found by watching instead, and keep gradients of their own: `siblings.py`.)
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .affiner import activated
from .forms import Form, gathered

#: Names of layers in one module that are given the same tensor, in the order they are called in.
KIN = (
    ("to_q", "to_k", "to_v"),
    ("add_q_proj", "add_k_proj", "add_v_proj"),
    ("q_proj", "k_proj", "v_proj"),
    ("q", "k", "v"),
    ("wq", "wk", "wv"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)
#: A cross-attention, whose q is given another tensor than its k and v.
_CROSS = re.compile(r"(^|\.)(attn2|\w*cross\w*)$")


class Kin(NamedTuple):
    """Some layers' forms, as far as one product serves them all.

    Attributes:
        down: D of all of them, one below the other, (ΣR, C_in), or gathered (K, ΣR, C_in).
        ranks: R of each.
        form: Of the first; its `chosen` and `rows` are those of all.
    """

    down: Tensor
    ranks: tuple[int, ...]
    form: Form


def kin_of(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Returns, for each layer that has kin among the names, all of them in order."""
    there = set(names)
    found: dict[str, tuple[str, ...]] = {}
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in there):
        for leaves in KIN:
            leaves = leaves[1:] if _CROSS.search(parent) and len(leaves) == 3 else leaves
            own = tuple(f"{parent}.{leaf}" for leaf in leaves if f"{parent}.{leaf}" in there)
            if len(own) > 1:
                found.update(dict.fromkeys(own, own))
    return found


def joined_kin(forms: Sequence[Form]) -> Kin | None:
    """Returns forms as kin; None where one product cannot serve them."""
    downs = [form.down for form in forms if form.down is not None and form.floor is None]
    alike = {(d.shape[-1], d.shape[:-2], d.dtype, d.device) for d in downs}
    if len(downs) < len(forms) or len(alike) > 1 or len({form.linear for form in forms}) > 1:
        return None
    return Kin(torch.cat(downs, dim=-2), tuple(down.shape[-2] for down in downs), forms[0])


class Products:
    """The product that the kin called last share; of one model."""

    def __init__(self) -> None:
        self._kin: Kin | None = None
        self._x: weakref.ref[Tensor] | None = None
        self._version = 0
        self._parts: tuple[Tensor, ...] = ()

    def __reduce__(self) -> tuple[type[Products], tuple[()]]:
        return (Products, ())

    def take(self, kin: Kin, place: int, x: Tensor, like: Tensor) -> Tensor | None:
        """Returns act(D x) of one layer, (…, R), gathered (B, N, R); None: it is on its own.

        Args:
            kin: The layer's kin.
            place: Its place among them; the first multiplies for all.
            x: Its input, the object itself, (…, C_in).
            like: The layer's output, for device and dtype.
        """
        if x.requires_grad and torch.is_grad_enabled():
            return None
        if place == 0:
            self._multiply(kin, x, like)
        known = self._x() if self._x is not None else None
        if self._kin is not kin or known is not x or self._version != _version(x):
            return None
        part = self._parts[place]
        if place == len(self._parts) - 1:
            self._kin, self._x, self._parts = None, None, ()
        return part

    def _multiply(self, kin: Kin, x: Tensor, like: Tensor) -> None:
        own, form = x.to(like.device, like.dtype), kin.form
        if not form.is_by_row:
            hidden = F.linear(own, kin.down)
        else:
            own = own.reshape(form.rows, -1, own.shape[-1])
            hidden = torch.bmm(own, gathered(kin.down, form).transpose(1, 2))
            if (
                form.chosen is not None and form.chosen.numel() > form.rows
            ):  # each place of a row holds all kin's units
                hidden = _by_layer(hidden, kin.ranks)
        self._kin, self._x, self._version = kin, weakref.ref(x), _version(x)
        hidden = activated(hidden, None, form.linear)
        widths = [hidden.shape[-1] // sum(kin.ranks) * rank for rank in kin.ranks]
        self._parts = hidden.split(widths, dim=-1)


def _by_layer(hidden: Tensor, ranks: Sequence[int]) -> Tensor:
    """Returns hidden units that lie task by task, (B, N, M·ΣR), layer by layer."""
    by_task = hidden.unflatten(-1, (-1, sum(ranks))).split(list(ranks), dim=-1)
    return torch.cat([own.flatten(-2) for own in by_task], dim=-1)


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version
