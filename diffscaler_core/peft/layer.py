"""One adapted layer as PEFT keeps it. The formula is `affiner.py`'s, folding is `folding.py`'s."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ..affiner import (
    PARTS,
    TENSORS,
    Affiner,
    affiner_from,
    apply_folded,
    fold,
    fold_alone,
    init_affiner,
)
from ..errors import DiffScalerError
from ..folding import TENSORS_OF, alike, fold_into, not_plain, unfoldable, weight_sum, weights_of
from ..hooks import LayerHook, hang
from ..stack import AffinerStack
from ..targets import Target, base_layer, bias_of, geometry_of

#: What PEFT calls the base in a list of adapter names.
BASE = "__base__"


class _Live(NamedTuple):
    """What `fold` reads of an affiner, straight from the parameters PEFT holds."""

    scale: Tensor | None
    shift: Tensor | None
    down: Tensor | None
    up: Tensor | None
    activation: str
    gain: float
    scale_includes_bias: bool


class DiffScalerLayer(nn.Module, BaseTunerLayer):
    """A layer and the affiners of its adapters: y' = y + Σ w Δ(x, y), y the innermost layer's.

    Args:
        base_layer: The layer, or what another PEFT method put around it.
        target: What there is to know of the layer.
    """

    adapter_layer_names = tuple(f"diffscaler_{name}" for name in TENSORS)
    other_param_names = ("r", "facts", "strengths")

    def __init__(self, base_layer: nn.Module, target: Target) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.target = target
        self.diffscaler_scale = nn.ParameterDict()
        self.diffscaler_shift = nn.ParameterDict()
        self.diffscaler_down = nn.ParameterDict()
        self.diffscaler_up = nn.ParameterDict()
        self.r: dict[str, int] = {}
        self.facts: dict[str, dict[str, Any]] = {}
        self.strengths: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        self._rows: tuple[str, ...] | None = None
        self._merged_at: dict[str, float] = {}
        self._kept: tuple[Tensor, Tensor | None] | None = None
        self._merged_sum = 0.0

    def update_layer(
        self,
        adapter_name: str,
        parts: Sequence[str],
        rank: int,
        facts: Mapping[str, Any],
        inference_mode: bool = False,
    ) -> None:
        """Adds an adapter, which changes nothing yet.

        Args:
            adapter_name: Its name.
            parts: Names among PARTS.
            rank: R of its subspace.
            facts: Its activation, gain and scale_includes_bias.
            inference_mode: Whether it is not to be trained.
        """
        out, inner, *kernel = self.target.shape
        fresh = init_affiner(parts, out, inner, kernel, rank)
        base: Any = base_layer(self)
        weight = base.weight
        # as PEFT has it: the base's dtype, unless that is too narrow to add up in
        wide = weight.dtype.is_floating_point and weight.dtype.itemsize > 1
        dtype = weight.dtype if wide else torch.float32
        self.put(adapter_name, {n: t.to(weight.device, dtype) for n, t in fresh.items()}, facts)
        BaseTunerLayer.set_adapter(self, self.active_adapters, inference_mode=inference_mode)

    def put(
        self, adapter_name: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
    ) -> None:
        """Gives an adapter these tensors, in their own dtype, in place of those it had."""
        for part in TENSORS:
            held = self._held(part)
            if adapter_name in held:
                del held[adapter_name]
            if part in tensors:
                held[adapter_name] = nn.Parameter(tensors[part], requires_grad=False)
        self.r[adapter_name] = len(tensors["down"]) if "down" in tensors else 0
        self.facts[adapter_name] = dict(facts)
        self.strengths.setdefault(adapter_name, 1.0)

    def tensors(self, adapter_name: str) -> dict[str, Tensor]:
        """Returns an adapter's parameters here by their names in a task file; often none."""
        held = {part: self._held(part) for part in TENSORS}
        return {part: h[adapter_name] for part, h in held.items() if adapter_name in h}

    def set_scale(self, adapter: str, scale: float) -> None:
        """Sets an adapter's strength: 0 is the base, 1 as trained."""
        if adapter in self.strengths:
            self.strengths[adapter] = float(scale)

    def scale_layer(self, scale: float) -> None:
        """Multiplies the strength of the active adapters."""
        for name in self._own(self.active_adapters):
            self.strengths[name] *= float(scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divides the strength of the active adapters by a factor; None: sets it to 1."""
        for name in self._own(self.active_adapters):
            self.strengths[name] = 1.0 if not scale else self.strengths[name] / float(scale)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the layer's output, corrected for the adapters that act; arguments as its own."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(*args, **kwargs)  # type: ignore[no-any-return]
        if not self._acting():
            return self.base_layer(*args, **kwargs)  # type: ignore[no-any-return]
        base = base_layer(self)
        hooked = any(isinstance(hook, LayerHook) for hook in base._forward_hooks.values())
        if base is self.base_layer and not hooked:
            x = args[0] if args else next(iter(kwargs.values()))
            return self._corrected(x, base(*args, **kwargs))
        # Beside tasks of `attach`, or around a LoRA: all of them see the frozen layer's own output,
        # so that their sum is the same in any order.
        with self._behind(base):
            return self.base_layer(*args, **kwargs)  # type: ignore[no-any-return]

    @contextmanager
    def _behind(self, base: nn.Module) -> Iterator[None]:
        own = cast(AffinerStack, self._corrected)  # called as one: (x, y, owned)
        hook, _, handle = hang(base, own)
        try:
            yield
        finally:
            hook.stacks.remove(own)
            if not hook.stacks:
                handle.remove()

    def _corrected(self, x: Tensor, y: Tensor, owned: bool = False) -> Tensor:
        """Returns y + Σ w Δ(x, y) over the adapters that act."""
        acting = self._acting()
        affiners = [_live(tensors, self.facts[name]) for name, _, tensors in acting]
        bias = self._bias() if any(a.scale is not None for a in affiners) else None
        if self._rows is None and [w for _, w, _ in acting] == [1.0]:
            folded = fold_alone(affiners[0], bias, y.device)
        else:
            folded = fold(affiners, self._weights(acting, y).to(y.device), bias)
        folded = folded.to(y.device, y.dtype)
        return apply_folded(x, y, folded, geometry_of(base_layer(self)))

    def _acting(self) -> list[tuple[str, float, dict[str, Tensor]]]:
        """Returns (adapter, strength, tensors) of what runs beside the layer, now."""
        if self.merged:
            kept = ((n, w, self._rest(n)) for n, w in self._merged_at.items())
            return [(n, w, tensors) for n, w, tensors in kept if w and tensors]
        names = self.active_adapters if self._rows is None else dict.fromkeys(self._rows)
        own = [(n, self.strengths[n]) for n in self._own(names)]
        return [(n, w, self.tensors(n)) for n, w in own if w]

    def _weights(self, acting: Sequence[tuple[str, float, Any]], y: Tensor) -> Tensor:
        """Returns the strengths as `fold` takes them: (K, 3), or (B, K, 3) with rows."""
        if self._rows is None:
            return torch.tensor([[w] * len(PARTS) for _, w, _ in acting])
        if y.shape[0] != len(self._rows):
            raise DiffScalerError(
                f"{len(self._rows)} adapter names are given, but {self.target.name!r} ran on a "
                f"tensor of shape {tuple(y.shape)}: name one adapter for each row of the batch, "
                f"guidance's rows too, or leave this layer out of the adapters"
            )
        table = [[[w * (n == row)] * len(PARTS) for n, w, _ in acting] for row in self._rows]
        return torch.tensor(table)

    def _bias(self) -> Tensor | None:
        base: Any = base_layer(self)
        bias = getattr(base, "bias", None)
        if bias is None or torch.compiler.is_compiling():  # which cannot ask what follows
            return cast("Tensor | None", bias)
        offloaded = bias.is_meta or bias.is_inference()
        return bias_of(self.target.name, base) if offloaded else cast(Tensor, bias)

    def set_rows(self, rows: tuple[str, ...] | None) -> tuple[str, ...] | None:
        """Sets which adapter each row of the batch runs, None: the active ones; returns the old."""
        before, self._rows = self._rows, rows
        return before

    def obstacle(self) -> str | None:
        """Returns why nothing can be folded into this layer's weights, or None."""
        if self.base_layer is not base_layer(self):
            return f"inside a {type(self.base_layer).__module__.split('.')[-2]} adapter of PEFT"
        return not_plain(base_layer(self))

    def leftovers(self, adapter_names: Sequence[str] | None = None) -> dict[str, str]:
        """Returns what merging would leave to run beside the weights: adapter -> reason."""
        left: dict[str, str] = {}
        for name in self._own(adapter_names or self.active_adapters):
            for _, why in self._unfoldable(name):
                left[name] = why
        return left

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Folds what folds into the layer's weights; the rest goes on running beside them.

        A copy of the weights is kept on the CPU, so that `unmerge` is exact.

        Args:
            safe_merge: Refuse a sum that is not finite.
            adapter_names: Which; None: the active ones.

        Raises:
            DiffScalerError: Weights that cannot be rewritten, or a sum that is not finite; they are
                then as they were.
        """
        names = self._own(check_adapters_to_merge(self, adapter_names))
        if not names:
            return
        if obstacle := self.obstacle():
            raise DiffScalerError(f"cannot merge into {self.target.name!r}: it is {obstacle}")
        base = base_layer(self)
        if self._kept is None:
            weight, bias = weights_of(base)
            copied = None if bias is None else bias.detach().to("cpu", copy=True)
            self._kept = weight.detach().to("cpu", copy=True), copied
        else:
            self._check_untouched()
            self._put_back()  # as scales of two adapters add, and do not multiply
        self._merged_at |= {name: self.strengths[name] for name in names}
        folds = {n: self._folding(n) for n, w in self._merged_at.items() if w}
        used = {n: tensors for n, tensors in folds.items() if tensors}
        if used:
            affiners = [affiner_from(tensors, self.facts[n]) for n, tensors in used.items()]
            fold_into(base, affiners, torch.tensor([[self._merged_at[n]] * 3 for n in used]))
        if safe_merge and not all(
            bool(t.isfinite().all()) for t in weights_of(base) if t is not None
        ):
            self._put_back()
            self._kept, self._merged_at, self.merged_adapters = None, {}, []
            raise DiffScalerError(
                f"merging {', '.join(names)} into {self.target.name!r} gives NaN or Inf; "
                f"the layer's own weights are back"
            )
        self._merged_sum = weight_sum(base)
        self.merged_adapters = list(self._merged_at)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Puts the layer's own weights back, bit for bit.

        Raises:
            DiffScalerError: Something else changed the weights since; they stay as they are.
        """
        if self.merged:
            self._check_untouched()
            self._put_back()
            self._kept, self._merged_at, self.merged_adapters = None, {}, []

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Returns the layer by itself, with or without what folds; `DiffScalerModel` has asked."""
        if merge:
            self.merge(safe_merge, adapter_names)
        else:
            self.unmerge()
        return base_layer(self)

    def _unfoldable(self, name: str) -> list[tuple[str, str]]:
        activation = self.facts[name]["activation"]
        return list(unfoldable(base_layer(self), self.tensors(name), activation))

    def _rest(self, name: str) -> dict[str, Tensor]:
        kept = {tensor for part, _ in self._unfoldable(name) for tensor in TENSORS_OF[part]}
        return {n: t for n, t in self.tensors(name).items() if n in kept}

    def _folding(self, name: str) -> dict[str, Tensor]:
        rest = self._rest(name)
        return {n: t.detach().clone() for n, t in self.tensors(name).items() if n not in rest}

    def _put_back(self) -> None:
        assert self._kept is not None
        for now, kept in zip(weights_of(base_layer(self)), self._kept, strict=True):
            if now is not None and kept is not None:
                now.copy_(kept)

    def _check_untouched(self) -> None:
        if not alike(self._merged_sum, base_layer(self)):
            raise DiffScalerError(
                f"the weight of {self.target.name!r} changed after it was merged, by a LoRA merged "
                f"or unmerged perhaps: undo that first"
            )

    def _own(self, names: Any) -> list[str]:
        """Returns those of the names that have an adapter here."""
        return [name for name in names if name in self.r]

    def _held(self, part: str) -> nn.ParameterDict:
        return cast(nn.ParameterDict, getattr(self, f"diffscaler_{part}"))


def _live(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Affiner:
    """Returns an affiner of these very tensors, so that gradients reach them."""
    scale, shift, down, up = (tensors.get(name) for name in TENSORS)
    return cast(Affiner, _Live(scale, shift, down, up, **facts))
