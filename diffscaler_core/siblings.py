"""Layers that read the same tensor, such as q, k and v, share one product with it.

Found while the model runs: layers called one after the other with the very same tensor object. From
then on the first of them multiplies by all their Ds at once, D_q over D_k over D_v, and each takes
its own part. No parameter changes, and the numbers are those of separate products but for their
last bits. Our choice, not the paper's: it saves time where width is small against the cost of
starting a product.

Only while parameters are trained: what is drawn with a finished task must be the same bit for bit
at the first call and at any later one.

What is shared carries no graph (each layer has its own gradients) and no reference to the input,
and goes with the input. So checkpointing, which runs parts again and may stop halfway, changes
nothing, nor does an exception between two siblings.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .affiner import activated


class Offer(NamedTuple):
    """A layer's D as it is now.

    Attributes:
        down: (R, C_in).
        linear: As in `Folded`.
    """

    down: Tensor
    linear: bool


class Member(Protocol):
    """A layer that may have siblings."""

    def offer(self, device: torch.device, dtype: torch.dtype) -> Offer | None:
        """Returns the D it would multiply by now, or None if it has none to share."""
        ...


class Shared(NamedTuple):
    """What one layer gets.

    Attributes:
        x: The input in the layer's dtype; None if it is that already.
        hidden: act(D x), (…, R).
    """

    x: Tensor | None
    hidden: Tensor


class Siblings:
    """Who are siblings among the layers of one model; shared by all its stacks."""

    def __init__(self) -> None:
        self._later: weakref.WeakKeyDictionary[Member, tuple[weakref.ref[Member], ...]] = (
            weakref.WeakKeyDictionary()
        )
        self._run: list[weakref.ref[Member]] = []
        self._run_x: weakref.ref[Tensor] | None = None
        self._products: _Products | None = None

    def __reduce__(self) -> tuple[type[Siblings], tuple[()]]:
        return (Siblings, ())  # copies and pickles find out anew

    def share(
        self, member: Member, x: Tensor, offer: Offer, device: torch.device, dtype: torch.dtype
    ) -> Shared | None:
        """Returns act(D x) for a layer that is being called with x; None if it has no siblings.

        Args:
            member: The layer.
            x: Its input, the object itself.
            offer: Its D as it is now.
            device: Where it computes.
            dtype: What it computes in.
        """
        self._note(member, x)
        products = self._products
        if products is None or not products.are_of(x, device, dtype):
            later = self._later.get(member)
            if later is None:
                self._products = None
                return None
            others = [sibling for sibling in (known() for known in later) if sibling is not None]
            self._products = products = _Products(self, [member, *others], x, device, dtype)
        taken = products.take(member, offer)
        if not products.parts:
            self._products = None
        return taken

    def forget(self, products: object) -> None:
        """Drops products whose input is gone."""
        if self._products is products:
            self._products = None

    def _note(self, member: Member, x: Tensor) -> None:
        """Remembers the run of layers that were called with one tensor, and what it was before."""
        same = self._run_x is not None and self._run_x() is x
        if same and all(known() is not member for known in self._run):
            self._run.append(weakref.ref(member))
            return
        first = self._run[0]() if self._run else None
        if first is not None and len(self._run) > 1:
            self._later[first] = tuple(self._run[1:])
        elif first is not None:
            self._later.pop(first, None)
        self._run, self._run_x = [weakref.ref(member)], weakref.ref(x)


class _Products:
    """act(D x) of several layers for one x, until each has taken its own."""

    @torch.no_grad()
    def __init__(
        self,
        owner: Siblings,
        members: list[Member],
        x: Tensor,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        asked = ((member, member.offer(device, dtype)) for member in members)
        offers = [(m, o) for m, o in asked if o is not None and o.down.shape[1] == x.shape[-1]]
        home, me = weakref.ref(owner), weakref.ref(self)

        def gone(_: object) -> None:
            siblings = home()
            if siblings is not None:
                siblings.forget(me())

        self._x = weakref.ref(x, gone)
        self._state = _state_of(x, device, dtype)
        own = x.detach().to(device, dtype)
        self._cast = None if (x.device, x.dtype) == (device, dtype) else own
        self.parts: dict[int, tuple[Offer, int, Tensor]] = {}
        if offers:
            with torch.autocast(device.type, enabled=False):
                down = torch.cat([offer.down.to(device, dtype) for _, offer in offers])
                self._split(F.linear(own, down), offers)

    def _split(self, hidden: Tensor, offers: list[tuple[Member, Offer]]) -> None:
        alike = len({offer.linear for _, offer in offers}) == 1
        if alike:
            hidden = activated(hidden, None, offers[0][1].linear)
        parts = hidden.split([offer.down.shape[0] for _, offer in offers], dim=-1)
        for (member, offer), part in zip(offers, parts, strict=True):
            if not alike:
                part = activated(part, None, offer.linear)
            self.parts[id(member)] = (offer, _version(offer.down), part)

    def are_of(self, x: Tensor, device: torch.device, dtype: torch.dtype) -> bool:
        """Says whether these are of this very tensor, unchanged since."""
        return self._x() is x and self._state == _state_of(x, device, dtype)

    def take(self, member: Member, offer: Offer) -> Shared | None:
        """Returns a layer's own part, once; None if its D has changed meanwhile."""
        part = self.parts.pop(id(member), None)
        if part is None:
            return None
        made_for, version, hidden = part
        if made_for.down is not offer.down or version != _version(offer.down):
            return None
        return Shared(self._cast, hidden)


def _version(t: Tensor) -> int:
    return 0 if t.is_inference() else t._version


def _state_of(x: Tensor, device: torch.device, dtype: torch.dtype) -> tuple[object, ...]:
    return (_version(x), device, dtype, torch.is_inference_mode_enabled())
