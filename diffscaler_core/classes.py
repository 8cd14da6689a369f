"""New classes on a class-conditional base: rows that follow its own table of class embeddings.

A base of classes looks each picture's class up in a table of N embeddings. A task may bring classes
of its own: class number N + i is the task's class i. Its embedding starts as that of an existing
class, the base's "no class" where it has one (DiffScaler, arXiv:2404.09976: new classes start from
the null embedding), and the task holds the difference to it,

    embed(N + i) = embed(start) + Σ wₖ rowsₖ[i],     rows = 0 at the start, w the shift's strength,

so at first, and at strength 0, a new class is exactly the class it starts from. A base may look
classes up in several tables (DiT has one per block); a task has rows for each of them.

Knows no host; `ClassGate` and `ClassHook` are how a call of plain torch reaches the stacks.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .affiner import PARTS
from .errors import DiffScalerError, MismatchError
from .families import FAMILIES
from .targets import base_layer

#: Before the names of a task's class rows, and their last part.
CLASSES, ROWS = "classes.", "rows"
#: The part whose strength the rows follow: like a shift, they are added.
_PART = PARTS.index("shift")


class ClassTable(NamedTuple):
    """One table of class embeddings.

    Attributes:
        name: Module path below the model.
        size: How many classes it holds, "no class" included.
        width: Numbers per embedding.
        null: The class that means "no class"; None if the architecture has none.
    """

    name: str
    size: int
    width: int
    null: int | None


def class_tables(model: nn.Module) -> tuple[ClassTable, ...]:
    """Returns the tables a model looks class numbers up in; none if it is told no classes."""
    name = type(model).__name__
    family = next((own for own in FAMILIES.values() if name in own.classes), None)
    if family is None or not family.class_tables:
        return ()
    found = []
    for path, module in model.named_modules():
        table: Any = base_layer(module)
        if re.fullmatch(family.class_tables, path) and hasattr(table, "num_embeddings"):
            null = table.num_embeddings - 1 if family.null_class == "last" else None
            found.append(ClassTable(path, table.num_embeddings, table.embedding_dim, null))
    return tuple(found)


class ClassRows(nn.Module):
    """One task's new classes in one table.

    Args:
        rows: Differences to the class they start from, (N, D).
    """

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows, requires_grad=False)

    def tensors(self) -> dict[str, Tensor]:
        """Returns the parameter, by its name in the file."""
        return {ROWS: self.rows}


class ClassStack(nn.Module):
    """The new classes of several tasks in one table.

    Args:
        table: The table.
        start: The class that all new ones start from.
        rows: One per task with new classes.
        slots: For each of them, its task's index among all tasks attached.
    """

    def __init__(
        self, table: ClassTable, start: int, rows: Sequence[ClassRows], slots: Sequence[int]
    ) -> None:
        super().__init__()
        self.name, self.table, self.start = table.name, table, start
        self.entries = nn.ModuleList(rows)
        self.slots = tuple(slots)
        self.bias: Tensor | None = None  # it has none; the other stacks may
        self.idle = False
        self._grouped = False
        self._weights = torch.ones(1, len(self.slots))
        self._laid: _Laid | None = None

    def set_weights(self, weights: Tensor) -> None:
        """Puts strengths in force: (K_all, 3) for the whole batch, or (B, K_all, 3) for rows."""
        own = weights[..., list(self.slots), _PART].detach().float().to("cpu", copy=True)
        self._put(own.view(-1, len(self.slots)), grouped=False)

    def set_groups(self, groups: Sequence[int] | None) -> None:
        """Makes each of len(groups) equal parts of the batch run one task alone, at strength 1."""
        if groups is not None:
            own = [[float(slot == group) for slot in self.slots] for group in groups]
            self._put(torch.tensor(own).view(len(own), -1), grouped=True)

    def _put(self, weights: Tensor, grouped: bool) -> None:
        self._weights, self._grouped = weights, grouped
        self.idle = not bool(weights.any())
        if self._laid is not None:
            self._laid.put(weights)

    def affiner_of(self, slot: int) -> ClassRows:
        """Returns the rows of the task with this index among all tasks attached."""
        return self._entries()[self.slots.index(slot)]

    def put(self, slot: int, rows: ClassRows, bias: Tensor | None = None) -> None:
        """Adds a task's rows, at strength 0; see `AffinerStack.put`."""
        self.entries.append(rows)
        self.slots = (*self.slots, slot)
        self._weights = F.pad(self._weights, (0, 1))
        self.unsettle()

    def check_start(self, new: ClassStack) -> None:
        """Raises MismatchError if the new stack's classes start from another class."""
        if new.start != self.start:
            raise MismatchError(
                f"new classes that start from class {new.start} cannot act beside those that start "
                f"from class {self.start}: attach them one after the other"
            )

    def renumber(self, slot: int) -> None:
        """Gives the only task another index."""
        (_,), self.slots = self.slots, (slot,)

    def drop(self, slot: int) -> None:
        """Takes a task's rows away, if it has some here."""
        if slot in self.slots:
            at = self.slots.index(slot)
            del self.entries[at]
            kept = [k for k in range(len(self.slots)) if k != at]
            self.slots = tuple(self.slots[k] for k in kept)
            self._weights = self._weights[:, kept]
            self.unsettle()

    def unsettle(self) -> None:
        """Drops what was computed; the next call computes it again."""
        self._laid = None

    def renew(self) -> None:
        """Takes up parameters that were changed in place, in the tensors compiled code knows."""
        if self._laid is not None:
            with torch.inference_mode(False), torch.no_grad():
                self._laid.table[1:] = torch.cat([own.rows for own in self._entries()])
            self._laid.version = self.version

    @property
    def count(self) -> int:
        """How many class numbers follow the table's own."""
        return max((len(own.rows) for own in self._entries()), default=0)

    @property
    def version(self) -> int:
        """A number that grows with every in-place change of a parameter."""
        return sum(t._version for t in self.parameters() if not t.is_inference())

    def forward(self, places: Tensor, y: Tensor) -> Tensor:
        """Returns y + Σ wₖ rowsₖ, shaped like y; y itself is never modified.

        Args:
            places: Per embedding 0 for a class of the table's own, i + 1 for new class i, (B,).
            y: The embeddings, those of new classes being their start's, (B, D).

        Raises:
            DiffScalerError: Rows or groups are set, and the batch does not fit them.
        """
        if not torch.compiler.is_compiling():
            if self.idle:
                return y
            if any(own.rows.requires_grad for own in self._entries()):
                return self._added(_lay(self._entries(), self._weights, y), places, y)
        self._prepare(y.device, y.dtype)
        return self._added(cast(_Laid, self._laid), places, y)

    @torch.compiler.assume_constant_result
    def _prepare(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Lays the rows out; where code is being compiled, while it is, not in it."""
        laid = self._laid
        if laid is None or laid.place != (device, dtype) or laid.version != self.version:
            with torch.inference_mode(False), torch.no_grad():
                like = torch.empty(0, device=device, dtype=dtype)
                self._laid = _lay(self._entries(), self._weights, like, self.version)
        return True

    def _added(self, laid: _Laid, places: Tensor, y: Tensor) -> Tensor:
        offsets, counts = laid.offsets, laid.counts  # (K, 1)
        own = (places > 0) & (places <= counts)
        rows = F.embedding(torch.where(own, offsets + places, 0), laid.table)  # (K, B, D)
        weights, batch = laid.weights, places.shape[0]
        if weights.shape[0] > 1:
            repeats, rest = divmod(batch, weights.shape[0])
            if rest or (repeats > 1 and not self._grouped):
                what = "groups" if self._grouped else "rows"
                raise DiffScalerError(
                    f"{weights.shape[0]} {what} are set, but {self.name!r} was asked for the "
                    f"classes of {batch} pictures: set as many {what} as the batch has"
                )
            weights = weights.repeat_interleave(repeats, dim=0)
        return y + (weights.T.unsqueeze(-1) * rows).sum(0)

    def _entries(self) -> list[ClassRows]:
        return [cast(ClassRows, own) for own in self.entries]


class _Laid:
    """All tasks' rows in one table on one device, behind a row of zeros.

    Attributes:
        table: (1 + ΣN, D).
        offsets: Row of `table` before each task's first, (K, 1).
        counts: How many each task has, (K, 1).
        weights: Strengths, (1 or B, K), changed in place while their shape stays.
        version: Of the parameters it was made of.
    """

    def __init__(self, table: Tensor, counts: Sequence[int], weights: Tensor, version: int) -> None:
        self.table, self.version = table, version
        self.counts = torch.tensor(counts, device=table.device).view(-1, 1)
        self.offsets = self.counts.cumsum(0) - self.counts
        self.weights = weights.to(table.device, table.dtype, copy=True)

    @property
    def place(self) -> tuple[torch.device, torch.dtype]:
        """Where it lies, and as what."""
        return self.table.device, self.table.dtype

    def put(self, weights: Tensor) -> None:
        """Puts other strengths in force."""
        with torch.inference_mode(False), torch.no_grad():
            if self.weights.shape == weights.shape:
                self.weights.copy_(weights)
            else:
                self.weights = weights.to(self.table.device, self.table.dtype, copy=True)


def _lay(entries: Sequence[ClassRows], weights: Tensor, like: Tensor, version: int = 0) -> _Laid:
    rows = [own.rows.to(like.device, like.dtype) for own in entries]
    table = F.pad(torch.cat(rows), (0, 0, 1, 0))
    return _Laid(table, [len(own) for own in rows], weights, version)


class ClassGate:
    """Runs before a table: new classes are looked up as the class they start from."""

    def __init__(self, table: ClassTable, start: int) -> None:
        self.table, self.start = table, start
        self.stacks: list[ClassStack] = []
        self.places: Tensor | None = None
        self._checked: tuple[weakref.ref[Tensor], int] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out what belongs to the last call."""
        return {**self.__dict__, "places": None, "_checked": None}

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Called by torch before the table; what it returns takes the arguments' place."""
        labels, *others = args
        if not torch.compiler.is_compiling():
            self._check(labels)
        self.places = (labels - (self.table.size - 1)).clamp(min=0)
        return torch.where(self.places > 0, self.start, labels), *others

    def _check(self, labels: Tensor) -> None:
        """Raises for a class that neither the base nor a task has; looks at each tensor once."""
        known = self._checked
        if known is not None and known[0]() is labels and known[1] == _version(labels):
            return
        limit = self.table.size + max(stack.count for stack in self.stacks)
        if not labels.is_meta and labels.numel() and int(labels.max()) >= limit:
            raise DiffScalerError(
                f"there is no class {int(labels.max())}: the base has 0 to {self.table.size - 1}, "
                f"and the tasks attached bring {self.table.size} to {limit - 1}"
            )
        self._checked = weakref.ref(labels), _version(labels)


class ClassHook:
    """Runs after a table: adds the new classes' rows. The one of its table; can be copied."""

    def __init__(self, gate: ClassGate) -> None:
        self.gate = gate

    @property
    def stacks(self) -> list[ClassStack]:
        """The stacks of all attachments."""
        return self.gate.stacks

    def __call__(self, module: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
        """Called by torch after the table; what it returns takes the embeddings' place."""
        places = cast(Tensor, self.gate.places)
        self.gate.places = None
        out = y
        for i, stack in enumerate(self.stacks):
            added = stack(places, y)  # each sees the table's own: a parallel sum
            out = added if i == 0 else out + (added - y)
        return out


class ClassHandle:
    """Takes one stack off its table, and with the last one both hooks."""

    def __init__(self, module: nn.Module, hook: ClassHook, stack: ClassStack) -> None:
        self.module, self.hook, self.stack = module, hook, stack

    def remove(self) -> None:
        """Takes the stack off; the table is then what it was."""
        if self.stack in self.hook.stacks:
            self.hook.stacks.remove(self.stack)
        if not self.hook.stacks:
            for hooks, own in (
                (self.module._forward_pre_hooks, self.hook.gate),
                (self.module._forward_hooks, self.hook),
            ):
                for key in [key for key, known in hooks.items() if known is own]:
                    del hooks[key]


def hang_classes(module: nn.Module, stack: ClassStack) -> ClassHandle:
    """Puts a stack behind a table; all attachments share the table's hooks.

    Raises:
        MismatchError: What is attached already has its new classes start from another class.
    """
    hooks = (hook for hook in module._forward_hooks.values() if isinstance(hook, ClassHook))
    hook = next(hooks, None)
    if hook is None:
        hook = ClassHook(ClassGate(stack.table, stack.start))
        module.register_forward_pre_hook(hook.gate)
        module.register_forward_hook(hook)
    elif hook.stacks:
        hook.stacks[0].check_start(stack)
    hook.stacks.append(stack)
    return ClassHandle(module, hook, stack)


def _version(labels: Tensor) -> int:
    return 0 if labels.is_inference() else labels._version
