"""What the base is told about each picture: stored, learned or encoded prompts, or class labels.

Rows are prompts, in the order of `TrainingData.prompts`; beside them lies the null prompt, the
base's own "nothing said", which replaces a prompt now and then so that classifier-free guidance
(arXiv:2207.12598) works with the task. The null prompt is never trained.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import DiffScalerError, first_names, unknown
from ..task import TaskAdapter
from .config import PERTURBATIONS, PROMPT_SOURCES
from .denoiser import Denoiser

NULL = ""  # how files name the null prompt
STORED = ("context", "pooled")  # what files can hold of a prompt
#: Frozen prompts larger than this (in bytes, all fields together) stay where they are, and only
#: a batch's rows travel to the device: ten thousand captions can be 80 GB.
LARGE = 256 * 2**20


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
            if null[name].shape != (1, *tensor.shape[1:]):
                raise DiffScalerError(
                    f"the null prompt's {name} is {tuple(null[name].shape[1:])}, the prompts' "
                    f"{tuple(tensor.shape[1:])}: both must come from the same text encoder"
                )
            if learned and name in STORED:
                own = tensor.detach().to(torch.float32, copy=True)
                self.register_parameter(name, nn.Parameter(own))
            else:  # never written to, so it may be shared, and keeps its own dtype
                self.register_buffer(name, tensor.detach())
            self.register_buffer(f"null_{name}", null[name].detach().clone())

    def forward(
        self,
        index: Tensor,
        dropped: Tensor | None = None,
        noise: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Returns the condition of a batch, floats as float32.

        Args:
            index: Which prompt each row has, (B,).
            dropped: Which rows get the null prompt instead, (B,) of bool; None: none.
            noise: What `draw_noise` drew for these rows; None: nothing is added. The null prompt
                stays as it is.
        """
        rows = {}
        for name in self.fields:
            table, null = getattr(self, name), getattr(self, f"null_{name}")
            rows[name] = table[index.to(table.device)].to(null.device)
        return self.mixed(rows, dropped, noise)

    def mixed(
        self,
        told: Mapping[str, Tensor],
        dropped: Tensor | None = None,
        noise: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Returns rows' condition with noise added and the null prompt put in; see `forward`."""
        condition = {}
        for name in self.fields:
            null = getattr(self, f"null_{name}")
            rows = told[name].to(null.device)
            if rows.is_floating_point():
                rows, null = rows.float(), null.float()
            if noise and name in noise:
                rows = rows + noise[name].to(rows)
            if dropped is not None:
                out = dropped.to(rows.device).view(-1, *(1,) * (rows.ndim - 1))
                rows = torch.where(out, null.to(rows.dtype), rows)
            condition[name] = rows
        return condition

    def draw_noise(
        self, count: int, perturb: str, gamma: float, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Returns noise for the embeddings of `count` rows: of a whole batch, for `forward`.

        Args:
            count: How many rows, B.
            perturb: "off", "uniform" or "gaussian"; see `perturbation`.
            gamma: γ.
            generator: A CPU generator, so that the numbers are the same on any number of devices.

        Raises:
            DiffScalerError: There is no embedding to perturb: the base is told class numbers (it
                looks their embeddings up by itself, where its null class lies too) or nothing.
        """
        if perturb not in PERTURBATIONS:
            raise unknown("perturbation", perturb, PERTURBATIONS)
        if perturb == "off" or gamma == 0:
            return {}
        names = [name for name in self.fields if getattr(self, name).is_floating_point()]
        names = [name for name in names if not name.startswith("mask")]
        if not names:
            told = ", ".join(self.fields) or "nothing"
            raise DiffScalerError(
                f"perturb {perturb!r} needs prompts' embeddings, and this base is told {told}: "
                f"set perturb to 'off'"
            )
        shapes = {name: (count, *self._tail(name)) for name in names}
        return {n: perturbation(shapes[n], perturb, gamma, generator) for n in names}

    def place(self, device: torch.device | str) -> Prompts:
        """Moves to the device what is learned, the null prompt, and the rest if it is not LARGE.

        `forward` gives its rows there in any case. Returns itself.
        """
        frozen = [getattr(self, name) for name in self.fields]
        frozen = [tensor for tensor in frozen if not tensor.requires_grad]
        large = sum(tensor.nbytes for tensor in frozen) > LARGE
        for name, tensor in [*self.named_parameters(), *self.named_buffers()]:
            if tensor.requires_grad:
                tensor.data = tensor.data.to(device)
            elif name.startswith("null_") or not large:
                setattr(self, name, tensor.to(device))
        return self

    def null(self, count: int) -> dict[str, Tensor]:
        """Returns the null prompt `count` times, floats as float32."""
        rows = {n: getattr(self, f"null_{n}").expand(count, *self._tail(n)) for n in self.fields}
        return {n: row.float() if row.is_floating_point() else row for n, row in rows.items()}

    def first(self, count: int) -> Prompts:
        """Returns the first few prompts, frozen."""
        fields = {name: getattr(self, name)[:count] for name in self.fields}
        null = {name: getattr(self, f"null_{name}") for name in self.fields}
        return Prompts(self.names[:count], fields, null)

    def stored(self) -> dict[str, Tensor]:
        """Returns context and pooled as they are now (copies on the CPU), to be saved in a task."""
        kept = [name for name in STORED if name in self.fields]
        return {name: getattr(self, name).detach().to("cpu", copy=True) for name in kept}

    def _tail(self, name: str) -> torch.Size:
        return getattr(self, name).shape[1:]  # type: ignore[no-any-return]


def perturbation(
    shape: Sequence[int],
    kind: str,
    gamma: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Returns noise for embeddings, shaped (…, D), float32, on the CPU.

    Condition embedding perturbation (arXiv:2405.20494): "uniform" in ±γ/√D, or "gaussian" of
    standard deviation γ/√D, drawn anew for each sample at each step. The paper's embedding is one
    vector; that each token of a text gets its own noise, with D its width, is our reading.

    Args:
        shape: Of the embeddings; the last number is D.
        kind: "uniform" or "gaussian".
        gamma: γ, about the length of one vector's noise (0.58 γ if uniform).
        generator: Random source.
    """
    size = gamma / math.sqrt(shape[-1])
    if kind == "gaussian":
        return torch.randn(tuple(shape), generator=generator) * size
    return (2 * torch.rand(tuple(shape), generator=generator) - 1) * size


def prompts_for(
    denoiser: Denoiser,
    names: Sequence[str],
    source: str = "auto",
    *,
    words: TaskAdapter | None = None,
    null: TaskAdapter | None = None,
    noise: float = 0.02,
    seed: int = 0,
    cache: str | Path | None = None,
    task: TaskAdapter | None = None,
) -> Prompts:
    """Returns the prompts of some names.

    Args:
        denoiser: The base.
        names: Prompts' names: class folders or captions.
        source: "stored" (in `words`), "encoded" (by the pipeline's text encoders), "learned" (one
            new prompt per name, trained with the task), "labels" (classes, of a base that is told
            classes), "none", or "auto": classes where the base is told those, else stored if all
            names are known words, else encoded if there is a text encoder, else learned if no name
            is known.
        words: A task that stores prompts.
        null: A task that stores the null prompt "", if `words` does not.
        noise: For "learned": standard deviation of the noise that tells new prompts apart, relative
            to that of the words' own values.
        seed: Seed of that noise.
        cache: A folder for encoded texts, if the base's `text_key` names its encoders.
        task: The task to go on from, whose new classes are known.

    Raises:
        DiffScalerError: The source cannot give these names.
    """
    if not denoiser.fields:
        return Prompts(names, {}, {})
    if "label" in denoiser.fields:
        return label_prompts(denoiser, names, task, alone=source != "labels")
    if source == "auto":
        source = _choose(denoiser, names, words)
    if source == "stored" and words is not None:
        return stored_prompts(words, names, null)
    if source == "encoded" and denoiser.encode_text is not None:
        return encoded_prompts(denoiser, names, cache)
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
        if field.startswith("mask"):
            # Task files store no mask, so a new prompt is trained as it will be used: all of it.
            fields[field] = torch.ones(len(names), *table.shape[1:], dtype=table.dtype)
            continue
        if field not in STORED:
            raise DiffScalerError(
                f"this base is told a {field!r} besides {' and '.join(STORED)}, which task files "
                f"cannot hold: use its text encoder (prompts 'encoded')"
            )
        table = table.float()
        middle = table[real].mean(0) if real else nothing[field][0].float()
        rows = [table[words.prompts.index(n)] if n in words.prompts else middle for n in names]
        spread = float(table[real].std()) if len(real) > 1 else float(middle.std())
        start = torch.stack(rows)
        fields[field] = start + noise * spread * torch.randn(start.shape, generator=generator)
    return Prompts(names, fields, nothing, learned=True)


@torch.no_grad()
def encoded_prompts(
    denoiser: Denoiser,
    names: Sequence[str],
    cache: str | Path | None = None,
    *,
    batch: int = 8,
) -> Prompts:
    """Returns prompts from the base's own text encoders, each text encoded once.

    Args:
        denoiser: The base.
        names: The texts.
        cache: A folder where encoded texts are kept and found again.
        batch: Texts encoded at a time; with a cache it is one, so that a text's padding does not
            hang on its neighbours.
    """
    encode, texts = denoiser.encode_text, [NULL, *names]
    assert encode is not None
    if cache is None or denoiser.text_key is None:
        parts = [encode(texts[i : i + batch]) for i in range(0, len(texts), batch)]
    else:
        from .data.cache import cached_texts

        parts = [cached_texts(encode, [text], denoiser.text_key, cache) for text in texts]
    fields = {name: _joined([part[name].cpu() for part in parts]) for name in parts[0]}
    null = {name: tensor[:1] for name, tensor in fields.items()}
    return Prompts(names, {name: tensor[1:] for name, tensor in fields.items()}, null)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Returns parts one after the other; shorter ones (L of (B, L, …)) end in zeros."""
    if parts[0].ndim < 2:
        return torch.cat(list(parts))
    longest = max(part.shape[1] for part in parts)
    tail = (0, 0) * (parts[0].ndim - 2)
    return torch.cat([F.pad(part, (*tail, 0, longest - part.shape[1])) for part in parts])


def label_prompts(
    denoiser: Denoiser,
    names: Sequence[str],
    task: TaskAdapter | None = None,
    *,
    alone: bool = True,
) -> Prompts:
    """Returns classes: those that the base or the task knows, and new ones for all other names.

    The base knows its classes by number, and by name if its pipeline has names for them. A new
    class gets the number after the last that is known; the task then brings it (see `classes.py`).

    Args:
        denoiser: The base.
        names: The classes' names.
        task: The task to go on from.
        alone: True: a single name that nobody knows (a folder without classes) is "no class".

    Raises:
        DiffScalerError: A number beyond the base's classes, or a base without "no class" is to be
            trained as that.
    """
    null, size = denoiser.null_label, denoiser.class_count
    known = dict(denoiser.class_names) | ({} if task is None else task.classes)
    known |= {name: int(name) for name in names if name.isdigit() and name not in known}
    last = (size if null is None else null) - 1
    beyond = [name for name in names if name.isdigit() and int(name) > last]
    if beyond:
        raise DiffScalerError(f"the base knows classes 0 to {last}; got {first_names(beyond)}")
    new = [name for name in names if name not in known]
    if alone and len(names) == 1 and new and null is not None:
        known[names[0]] = null
    else:
        first = size + (0 if task is None else len(task.new_classes))
        known |= {name: first + i for i, name in enumerate(new)}
    fields = {"label": torch.tensor([known[name] for name in names])}
    return Prompts(names, fields, {"label": torch.tensor([null or 0])})


def new_classes(denoiser: Denoiser, prompts: Prompts) -> list[str]:
    """Returns the names of the classes that the base has not got, in the order of their numbers."""
    if "label" not in prompts.fields:
        return []
    labels = torch.as_tensor(prompts.label).tolist()
    found = zip(labels, prompts.names, strict=True)
    return [name for label, name in sorted(found) if label >= denoiser.class_count]


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
