"""In-context control for SD3 and Flux, to be measured beside DiffScaler's control affiner.

The control picture becomes tokens of its own, as in OminiControl (arXiv:2411.15098) and EasyControl
(arXiv:2503.07027): through the base's own patch embedding, at the positions of the picture's
tokens, through the base's own blocks under affiners that act on these tokens alone. They see
themselves only and a fixed time 0, no text and no x, so a picture's keys and values are computed
once and serve every step. The picture's tokens, not the text's, attend to them:

    added:  A' = A + g ⊙ softmax(Q K_cᵀ) V_c
    joint:  A' = A + g ⊙ (softmax(Q [K; K_c]ᵀ + [0; β]) [V; V_c] − A)

A is what the frozen attention gives, from its own call, and g (one per head) is 0 at the start: so
the start is the base bit for bit, and g has a gradient at once. The usual form, one softmax over
both kinds of keys, has no such start: a bias of −∞ on the new keys has the gradient 0 for ever, a
finite one is not exact, and more keys change the order of the kernel's sums. "joint" contains it
(g = 1) and pays a second attention for it; "added" is IP-Adapter's way and cheaper.

No file of a base or of diffusers is copied: blocks run as they are, with a text of no tokens, and
an attention processor passes the call on and looks at the one attention that happens inside.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from diffscaler_core import DiffScalerError, TaskAdapter, new_task
from diffscaler_core.affiner import PARTS
from diffscaler_core.ensemble import Ensemble
from diffscaler_core.matching import build_stacks, match_layers
from diffscaler_core.scales import ScaleWatch
from diffscaler_core.siblings import Siblings
from diffscaler_core.stack import AffinerStack
from diffscaler_core.tokens import pack

COMBINE = ("added", "joint")
#: What g is for a parameter of 1. Adam moves a parameter by its rate per step, and g has to get
#: from 0 to about 1 while the affiners move by a few hundredths.
GATE_GAIN = 10.0

Change = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Stream(NamedTuple):
    """A control picture on its way into the blocks.

    Attributes:
        tokens: (R, N, D).
        temb: What modulates them, (R, D): time 0 and pooled text 0.
        extra: Further arguments of a block.
    """

    tokens: Tensor
    temb: Tensor
    extra: dict[str, Any]


def _sd3(model: Any, latents: Tensor, given: dict[str, Any]) -> Stream:
    zero = latents.new_zeros(len(latents))
    pooled = latents.new_zeros(len(latents), model.config.pooled_projection_dim)
    return Stream(model.pos_embed(latents), model.time_text_embed(zero, pooled), {})


def _flux(model: Any, latents: Tensor, given: dict[str, Any]) -> Stream:
    tokens = pack(latents)
    zero = tokens.new_zeros(len(tokens))
    pooled = tokens.new_zeros(len(tokens), model.config.pooled_projection_dim)
    guidance = (zero + 1000,) if model.config.guidance_embeds else ()
    ids = given["img_ids"]
    rope = model.pos_embed(ids[0] if ids.ndim == 3 else ids)
    temb = model.time_text_embed(zero, *guidance, pooled)
    return Stream(model.x_embedder(tokens), temb, {"image_rotary_emb": rope})


class Form(NamedTuple):
    """How one class of transformers is built.

    Attributes:
        embed: (model, latents, arguments of its call) -> Stream.
        lists: Its lists of blocks, in the order they run.
        image_first: Whether pictures' tokens come before the text's.
        targets: The Linears that pictures' tokens pass in a block.
    """

    embed: Callable[[Any, Tensor, dict[str, Any]], Stream]
    lists: tuple[str, ...]
    image_first: bool
    targets: str


FORMS = {
    "SD3Transformer2DModel": Form(
        _sd3, ("transformer_blocks",), True, r"attn2?\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2)"
    ),
    "FluxTransformer2DModel": Form(
        _flux,
        ("transformer_blocks", "single_transformer_blocks"),
        False,
        r"attn\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2)|proj_mlp|proj_out",
    ),
}


class InContext:
    """In-context control on a stock transformer, until `remove()`.

    The base is never written to. With a control set, plain calls of the transformer use it; without
    one they are the base bit for bit. Other attachments on the model act on the control's tokens
    as well.

    Args:
        transformer: SD3Transformer2DModel or FluxTransformer2DModel of diffusers.
        rank: R of the affiners on the control's tokens.
        block_rank: R of further affiners on every Linear of the blocks for picture and text, as
            DiffScaler's control tasks have; 0: none. They act where there is a control.
        combine: A name in COMBINE.
        method: Of all affiners.
        seed: Of the random D.

    Raises:
        DiffScalerError: Another class of models, or an unknown `combine`.
    """

    def __init__(
        self,
        transformer: nn.Module,
        rank: int = 16,
        *,
        block_rank: int = 0,
        combine: str = "added",
        method: str = "diffscaler",
        seed: int = 0,
    ) -> None:
        form = FORMS.get(type(transformer).__name__)
        if form is None or combine not in COMBINE:
            raise DiffScalerError(
                f"in-context control is for {', '.join(FORMS)} with combine one of "
                f"{', '.join(COMBINE)}; got {type(transformer).__name__} and {combine!r}"
            )
        self.model: Any = transformer
        self.form, self.combine = form, combine
        self.blocks: list[Any] = [b for name in form.lists for b in getattr(transformer, name)]
        own = new_task(transformer, method, rank, targets_of(transformer), "in-context", seed=seed)
        self.stacks = _stacks(transformer, own)
        self.block_stacks: dict[str, AffinerStack] = {}
        if block_rank:
            task = new_task(transformer, method, block_rank, name="blocks", seed=seed)
            self.block_stacks = _stacks(transformer, task)
        like = next(transformer.parameters())
        heads = [block.attn.heads for block in self.blocks]
        self.gates = [nn.Parameter(torch.zeros(h, 1, 1, device=like.device)) for h in heads]
        biases = heads if combine == "joint" else []
        self.biases = [nn.Parameter(torch.zeros(h, 1, 1, device=like.device)) for h in biases]
        self._signature = inspect.signature(transformer.forward)
        self._latents: Tensor | None = None
        self._rows: Tensor | None = None
        self._embedding = False  # whether the control's own tokens are under way
        self._seen: list[tuple[Tensor, Tensor]] | None = None
        self._seen_for: tuple[Any, ...] = ()
        self._install()

    def parameters(self) -> list[nn.Parameter]:
        """Returns everything that is trained."""
        stacks = [*self.stacks.values(), *self.block_stacks.values()]
        return [p for stack in stacks for p in stack.parameters()] + self.gates + self.biases

    @property
    def cached_bytes(self) -> int:
        """Bytes of the keys and values that are kept."""
        return sum(t.numel() * t.element_size() for pair in self._seen or () for t in pair)

    def set_control(self, latents: Tensor | None, kept: Tensor | None = None) -> None:
        """Gives the next calls their control pictures.

        Args:
            latents: (R, C, h, w) as the base's VAE encodes them; a batch of several times R rows
                (guidance) repeats them. None: no control.
            kept: (R,), False (0) where a row has no control after all; None: all have.
        """
        if latents is not self._latents:
            self._seen, self._seen_for = None, ()
        self._latents = latents
        self._rows = None if kept is None else kept.bool()

    def remove(self) -> None:
        """Takes everything off; the model is what it was. Idempotent."""
        for handle in self._handles:
            handle.remove()
        for block, stock in self._stock:
            block.attn.processor = stock
        self._handles.clear()
        self._stock.clear()

    def _install(self) -> None:
        self._handles: list[Any] = []
        self._stock: list[tuple[Any, Any]] = []
        hook = self.model.register_forward_pre_hook(self._before, with_kwargs=True)
        self._handles.append(hook)
        for name, stack in self.stacks.items():
            self._hook(name, stack, self._own_affiner)
        for name, stack in self.block_stacks.items():
            self._hook(name, stack, self._block_affiner)
        for i, block in enumerate(self.blocks):
            self._stock.append((block, block.attn.processor))
            block.attn.processor = _Processor(block.attn.processor, self, i)

    def _hook(self, name: str, stack: AffinerStack, apply: Callable[..., Tensor]) -> None:
        module = self.model.get_submodule(name)

        def hook(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
            return apply(stack, args[0], y)

        self._handles.append(module.register_forward_hook(hook))

    def _own_affiner(self, stack: AffinerStack, x: Tensor, y: Tensor) -> Tensor:
        return stack(x, y) if self._embedding else y

    def _block_affiner(self, stack: AffinerStack, x: Tensor, y: Tensor) -> Tensor:
        if self._embedding or self._seen is None:
            return y
        return self._in_rows(stack(x, y), y)

    def _in_rows(self, changed: Tensor, y: Tensor) -> Tensor:
        """Returns `changed` in rows that have a control, y itself in others."""
        if self._rows is None:
            return changed
        rows = self._rows.to(y.device).repeat(len(y) // len(self._rows))
        return torch.where(rows.view(-1, *(1,) * (y.ndim - 1)), changed, y)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Has the control's keys and values ready when a call of the model begins."""
        if self._latents is None:
            self._seen = None
            return
        given = self._signature.bind(*args, **kwargs).arguments
        x = given["hidden_states"]
        self._check(x)
        live = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        version = sum(stack.version for stack in self.stacks.values())
        now = (x.device, x.dtype, version)
        if live:
            self._seen, self._seen_for = self._keys_and_values(x, given), ()
        elif self._seen is None or self._seen_for != now:
            with torch.inference_mode(False), torch.no_grad():
                self._seen, self._seen_for = self._keys_and_values(x, given), now

    def _check(self, x: Tensor) -> None:
        assert self._latents is not None
        rows, _, height, width = self._latents.shape
        tokens = (height // 2) * (width // 2)
        fits = x.shape[-2:] == (height, width) if x.ndim == 4 else x.shape[1] == tokens
        if not fits or len(x) % rows:
            raise DiffScalerError(
                f"control latents {tuple(self._latents.shape)} do not fit a call with "
                f"{tuple(x.shape)}: give pictures of the same size, one or one per row"
            )

    def _keys_and_values(self, x: Tensor, given: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
        """Runs the control's tokens through the blocks; returns K and V of each, (R, H, N, d)."""
        assert self._latents is not None
        stream = self.form.embed(self.model, self._latents.to(x), given)
        tokens, nothing = stream.tokens, stream.tokens[:, :0]
        found: list[tuple[Tensor, Tensor]] = []
        self._found, self._embedding = found, True
        try:
            for block in self.blocks:
                _, tokens = block(
                    hidden_states=tokens,
                    encoder_hidden_states=nothing,
                    temb=stream.temb,
                    **stream.extra,
                )
        except _Complete:
            pass
        finally:
            self._embedding = False
            del self._found
        return found

    def _note(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Tensor:
        """Keeps K and V while the control's own tokens are under way."""
        self._found.append((k, v))
        if len(self._found) == len(self.blocks):
            raise _Complete
        return out

    def _attend(self, i: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Tensor:
        """Returns the attention of block i, (B, H, N + text, d), with the control for pictures."""
        assert self._seen is not None
        k_c, v_c = (_rows(t, len(q)) for t in self._seen[i])
        count = k_c.shape[2]
        image = slice(0, count) if self.form.image_first else slice(q.shape[2] - count, q.shape[2])
        q, own = q[:, :, image], out[:, :, image]
        if self.combine == "added":
            extra = F.scaled_dot_product_attention(q, k_c, v_c)
        else:
            bias = self.biases[i].to(q).expand(-1, q.shape[2], count)
            mask = F.pad(bias, (k.shape[2], 0)).unsqueeze(0)
            keys, values = torch.cat([k, k_c], 2), torch.cat([v, v_c], 2)
            extra = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask) - own
        gate = (self.gates[i] * GATE_GAIN).to(own)
        changed = self._in_rows(torch.addcmul(own, gate, extra), own)
        rest = out[:, :, count:] if self.form.image_first else out[:, :, : image.start]
        return torch.cat([changed, rest] if self.form.image_first else [rest, changed], 2)


class _Complete(Exception):
    """The last keys and values are there; what the blocks would still do is not needed."""


class _Processor:
    """A stock attention processor; what its attention gives goes through an `InContext`."""

    def __init__(self, stock: Any, owner: InContext, index: int) -> None:
        self.stock, self.owner, self.index = stock, owner, index

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        """Runs the stock processor; arguments are its own."""
        rope = () if image_rotary_emb is None else (image_rotary_emb,)
        call = (attn, hidden_states, encoder_hidden_states, attention_mask, *rope)
        owner = self.owner
        if owner._embedding:
            with _Attention(owner._note):
                return self.stock(*call)
        if owner._seen is None:
            return self.stock(*call)
        with _Attention(lambda *tensors: owner._attend(self.index, *tensors)):
            return self.stock(*call)


class _Attention(TorchFunctionMode):
    """While it is on, what torch's attention returns is what `change(q, k, v, it)` returns."""

    def __init__(self, change: Change) -> None:
        super().__init__()
        self.change = change

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Calls the function; torch calls this for each of its own."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is not F.scaled_dot_product_attention:
            return out
        named = (kwargs[name] for name in ("query", "key", "value") if name in kwargs)
        return self.change(*args[:3], *named, out)


def targets_of(model: nn.Module) -> str:
    """Returns a pattern of the layers that get an affiner for the control's tokens.

    After the last block's keys and values nothing of their stream is used.
    """
    form = FORMS[type(model).__name__]
    end = rf"{form.lists[-1]}\.{len(getattr(model, form.lists[-1])) - 1}\."
    return rf"(?!{end})({'|'.join(form.lists)})\.\d+\.({form.targets})|{end}attn\.to_(k|v)"


def _stacks(model: nn.Module, task: TaskAdapter) -> dict[str, AffinerStack]:
    """Returns a new task's affiners on the model's device, ready to train."""
    layers = {task.name: task.component_layers("transformer")}
    modules = match_layers(model, {task.name: task}, layers)
    stacks = build_stacks({task.name: task}, layers, modules, type(model).__name__)
    shared = Ensemble(), Siblings(), ScaleWatch()
    device = next(model.parameters()).device
    for stack in stacks.values():
        stack.join(*shared)
        stack.set_weights(torch.ones(1, len(PARTS)))
        stack.to(device).requires_grad_()
    return stacks


def _rows(tensor: Tensor, count: int) -> Tensor:
    """Returns (R, …) as (count, …), all rows again and again."""
    if len(tensor) == 1:
        return tensor.expand(count, -1, -1, -1)
    return tensor if len(tensor) == count else tensor.repeat(count // len(tensor), 1, 1, 1)
