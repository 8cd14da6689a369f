"""What the base is told about each picture: stored, learned or encoded prompts, or class labels.

Rows are prompts, in the order of `TrainingData.prompts`; beside them lies the null prompt, the
base's own "nothing said", which replaces a prompt now and then so that classifier-free guidance
(arXiv:2207.12598) works with the task. The null prompt is never trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..errors import DiffScalerError, first_names
from ..task import TaskAdapter
from .config import PROMPT_SOURCES
from .denoiser import Denoiser

NULL = ""  # how files name the null prompt


class Prompts(nn.Module):
    """N prompts and the null prompt.

    Args:
        names: The prompts' names.
        fields: "context" (N, L, D), "pooled" (N, P), "mask" (N, L), "label" (N,);
            any may be absent.
        null: The same for the null prompt, N = 1.
        learned: True: context and pooled are parameters.
    """

    def __init__(
        self,
        names: Sequence[str],
        fields: Mapping[str, Tensor],
        null: Mapping[str, Tensor],
        *,
        learned: bool = False,
    ) -> None:
        super().__init__()
        self.names = tuple(names)
        self.learned = learned
        self.fields = tuple(fields)
        for name, tensor in fields.items():
            own = tensor.detach().clone()
            own = own.float() if own.is_floating_point() else own
            if own.is_floating_point():
                self.register_parameter(name, nn.Parameter(own, requires_grad=learned))
            else:
                self.register_buffer(name, own)
            self.register_buffer(f"null_{name}", null[name].detach().clone())

    def forward(self, index: Tensor, dropped: Tensor | None = None) -> dict[str, Tensor]:
        """Returns the condition of a batch.

        Args:
            index: Which prompt each row has, (B,).
            dropped: Which rows get the null prompt instead, (B,) of bool; None: none.
        """
        condition = {}
        for name in self.fields:
            rows = getattr(self, name)[index]
            if dropped is not None:
                null = getattr(self, f"null_{name}").to(rows.dtype)
                rows = torch.where(dropped.view(-1, *(1,) * (rows.ndim - 1)), null, rows)
            condition[name] = rows
        return condition

    def null(self, count: int) -> dict[str, Tensor]:
        """Returns the null prompt `count` times."""
        return {n: getattr(self, f"null_{n}").expand(count, *self._tail(n)) for n in self.fields}

    def first(self, count: int) -> Prompts:
        """Returns the first few prompts, frozen."""
        fields = {name: getattr(self, name)[:count] for name in self.fields}
        null = {name: getattr(self, f"null_{name}") for name in self.fields}
        return Prompts(self.names[:count], fields, null)

    def stored(self) -> dict[str, Tensor]:
        """Returns context and pooled as they are now (copies on the CPU), to be saved in a task."""
        kept = [name for name in ("context", "pooled") if name in self.fields]
        return {name: getattr(self, name).detach().to("cpu", copy=True) for name in kept}

    def _tail(self, name: str) -> torch.Size:
        return getattr(self, name).shape[1:]  # type: ignore[no-any-return]


def prompts_for(
    denoiser: Denoiser,
    names: Sequence[str],
    source: str = "auto",
    *,
    words: TaskAdapter | None = None,
    null: TaskAdapter | None = None,
    noise: float = 0.02,
    seed: int = 0,
) -> Prompts:
    """Returns the prompts of some names.

    Args:
        denoiser: The base.
        names: Prompts' names: class folders or captions.
        source: "stored" (in `words`), "encoded" (by the pipeline's text encoders), "learned" (one
            new prompt per name, trained with the task), "labels" (class numbers), "none", or
            "auto": stored if all names are known words, else encoded if there is a text encoder,
            else learned if no name is known.
        words: A task that stores prompts.
        null: A task that stores the null prompt "", if `words` does not.
        noise: For "learned": standard deviation of the noise that tells new prompts apart, relative
            to that of the words' own values.
        seed: Seed of that noise.

    Raises:
        DiffScalerError: The source cannot give these names.
    """
    if not denoiser.fields:
        return Prompts(names, {}, {})
    if "label" in denoiser.fields:
        return label_prompts(denoiser, names)
    if source == "auto":
        source = _choose(denoiser, names, words)
    if source == "stored" and words is not None:
        return stored_prompts(words, names, null)
    if source == "encoded" and denoiser.encode_text is not None:
        return encoded_prompts(denoiser, names)
    if source == "learned":
        known = words if words is not None else _null_words(denoiser)
        return learned_prompts(known, names, noise=noise, seed=seed)
    raise DiffScalerError(
        f"prompts {source!r} cannot be had: 'stored' needs a words file, 'encoded' a text encoder, "
        f"'learned' either; sources: {', '.join(PROMPT_SOURCES)}"
    )


def stored_prompts(
    words: TaskAdapter, names: Sequence[str], null: TaskAdapter | None = None
) -> Prompts:
    """Returns known words' prompts, frozen.

    Raises:
        DiffScalerError: Some names are not among them.
    """
    unknown = [name for name in names if name not in words.prompts]
    if unknown:
        raise DiffScalerError(
            f"{len(unknown)} of {len(names)} prompts are not among the {len(words.prompts)} of "
            f"{words.name!r}: {first_names(unknown)}; rename the folders, or learn new prompts "
            f"(prompts 'learned')"
        )
    rows = torch.tensor([words.prompts.index(name) for name in names])
    fields = {name: table[rows] for name, table in words.conditioning.items()}
    return Prompts(names, fields, _null_of(null or words))


def learned_prompts(
    words: TaskAdapter, names: Sequence[str], *, noise: float = 0.02, seed: int = 0
) -> Prompts:
    """Returns one trainable prompt per name (textual inversion, arXiv:2208.01618).

    A name that is a known word starts from it, another from the mean of all words (from the null
    prompt if there are no words), plus a little noise that tells the new prompts apart.
    """
    generator = torch.Generator().manual_seed(seed)
    nothing = _null_of(words)
    real = [i for i, name in enumerate(words.prompts) if name != NULL]
    fields = {}
    for field, table in words.conditioning.items():
        if not table.is_floating_point():  # a mask
            fields[field] = nothing[field].expand(len(names), *table.shape[1:])
            continue
        table = table.float()
        middle = table[real].mean(0) if real else nothing[field][0].float()
        rows = [table[words.prompts.index(n)] if n in words.prompts else middle for n in names]
        spread = float(table[real].std()) if len(real) > 1 else float(middle.std())
        start = torch.stack(rows)
        fields[field] = start + noise * spread * torch.randn(start.shape, generator=generator)
    return Prompts(names, fields, nothing, learned=True)


@torch.no_grad()
def encoded_prompts(denoiser: Denoiser, names: Sequence[str], batch: int = 8) -> Prompts:
    """Returns prompts from the pipeline's own text encoders, each text encoded once."""
    assert denoiser.encode_text is not None
    texts = [NULL, *names]
    parts = [denoiser.encode_text(texts[i : i + batch]) for i in range(0, len(texts), batch)]
    fields = {name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]}
    null = {name: tensor[:1] for name, tensor in fields.items()}
    return Prompts(names, {name: tensor[1:] for name, tensor in fields.items()}, null)


def label_prompts(denoiser: Denoiser, names: Sequence[str]) -> Prompts:
    """Returns class labels: a name that is a number is that class, others take the first free ones.

    A single name that is no number (a folder without classes) is trained as "no class".

    Raises:
        DiffScalerError: More classes than the base has, or a number beyond them.
    """
    null = int(denoiser.null_label or 0)
    taken = {int(name) for name in names if name.isdigit()}
    free = (i for i in range(null) if i not in taken)
    if len(names) > null or any(label >= null for label in taken):
        raise DiffScalerError(f"the base knows classes 0 to {null - 1}; got {first_names(names)}")
    if len(names) == 1 and not taken:
        labels = [null]
    else:
        labels = [int(name) if name.isdigit() else next(free) for name in names]
    fields = {"label": torch.tensor(labels)}
    return Prompts(names, fields, {"label": torch.tensor([null])})


def _choose(denoiser: Denoiser, names: Sequence[str], words: TaskAdapter | None) -> str:
    known = 0 if words is None else sum(name in words.prompts for name in names)
    if known == len(names):
        return "stored"
    if denoiser.encode_text is not None:
        return "encoded"
    return "stored" if known else "learned"  # some known: stored_prompts names the others


def _null_of(words: TaskAdapter) -> dict[str, Tensor]:
    if NULL not in words.prompts:
        raise DiffScalerError(
            f'{words.name!r} stores no null prompt (named ""), which guidance and new prompts need'
        )
    i = words.prompts.index(NULL)
    return {name: tensor[i : i + 1] for name, tensor in words.conditioning.items()}


def _null_words(denoiser: Denoiser) -> TaskAdapter:
    """Returns the text encoder's null prompt as a table of one word."""
    if denoiser.encode_text is None:
        raise DiffScalerError(
            'learned prompts need the base\'s null prompt: give a words file that stores it (""), '
            "or a pipeline with a text encoder"
        )
    with torch.no_grad():
        null = {k: v.cpu() for k, v in denoiser.encode_text([NULL]).items()}
    return TaskAdapter({}, {"name": "null", "method": "prompts", "prompts": [NULL]}, null)
