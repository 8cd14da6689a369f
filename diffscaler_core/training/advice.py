"""Advice for a run, one line each: before it starts, and when validation says it should end.

The thresholds are our rules of thumb from the tasks in `assets/pocket` and from what trainers of
LoRAs commonly advise; no paper fixes them. Advice never changes a run.
"""

from __future__ import annotations

from statistics import median

from ..auto_rank import RankChoice
from ..methods import METHODS
from .config import TrainingConfig
from .progress import History

FEW_PICTURES = 10  # below: a task learns the pictures rather than what they have in common
MANY_VIEWS = 200  # times that each picture is shown, above which it is learned by heart
WIDE_RANK, FEW_FOR_WIDE = 16, 50  # a rank above, for fewer pictures than
SMALL_BASE, SLOW_FOR_SMALL = 50_000_000, 1e-3  # parameters; learning rate
LARGE_BASE, FAST_FOR_LARGE = 500_000_000, 5e-3
#: Pictures per unit of the widest subspace below which ranks were chosen by too few. A subspace of
#: dimension d can be learned from about d samples and not from fewer (arXiv:2409.02426: a phase
#: transition at N ≥ d); half of the pictures find a direction, the other half confirm it.
PICTURES_PER_RANK = 2
LEAST_CONFIRMED = 0.5  # of what one half of the pictures asks for; less is mostly chance
FEW_STEPS_FOR_CONTROL = 900  # in our toy trial no control could be judged before
SURELY_CONTROLLED = 0.005  # of the loss: another picture's control must do that much worse
RISES = 3  # validations in a row above the best
_SURELY = 0.001  # of the best loss: less of a rise is none


def before_training(
    config: TrainingConfig, pictures: int, base_parameters: int = 0
) -> tuple[str, ...]:
    """Returns what should be thought over before a run.

    Args:
        config: The run's settings.
        pictures: How many pictures it trains on.
        base_parameters: How many the base has; 0: unknown.
    """
    said = []
    if pictures < FEW_PICTURES:
        said.append(
            f"{pictures} pictures are few: the task may learn them by heart; more pictures help "
            f"most, flip and crops a little"
        )
    views = config.steps * config.batch / max(1, pictures)
    if views > MANY_VIEWS:
        fewer = max(1, round(MANY_VIEWS * pictures / config.batch))
        said.append(
            f"each of the {pictures} pictures will be shown {views:.0f} times; above "
            f"{MANY_VIEWS} they tend to be learned by heart: try steps {fewer}, or keep some for "
            f"validation (validation_share 0.2) to see when"
        )
    if config.batch > pictures:
        said.append(
            f"a batch of {config.batch} shows the same picture twice, as there are only "
            f"{pictures}; batch {pictures} is enough"
        )
    wide = isinstance(config.rank, int) and config.rank > WIDE_RANK
    if wide and pictures < FEW_FOR_WIDE and _has_rank(config):
        said.append(f"rank {config.rank} is wide for {pictures} pictures; 4 to 8 usually do")
    return (*said, *_control(config), *_rates(config, base_parameters))


def about_ranks(chosen: RankChoice) -> tuple[str, ...]:
    """Returns what speaks against ranks that were chosen by the pictures."""
    said, widest = [], max(chosen.ranks.values(), default=0)
    if 0 < chosen.pictures < PICTURES_PER_RANK * widest:
        said.append(
            f"{chosen.pictures} pictures are few to choose ranks up to {widest} by: a subspace "
            f"takes at least {PICTURES_PER_RANK} per unit of rank; take more pictures, or a "
            f"smaller rank_budget"
        )
    if chosen.confirmed < LEAST_CONFIRMED:
        said.append(
            f"one half of the pictures confirms {chosen.confirmed:.0%} of what the other half asks "
            f"for, so the chosen ranks follow chance more than the task; take more pictures"
        )
    return tuple(said)


def after_validation(history: History, last: bool = False) -> tuple[str, ...]:
    """Returns advice to stop, once per rise; at the end also whether a control is gone by.

    The rule: the last three validations are all later than the best one, and each lies above it by
    more than the noise and by more than a thousandth. The noise is how much validations jump about
    their own straight line: 1.48 times the median of |v(i−1) − 2 v(i) + v(i+1)|, over √6 (what that
    median and that sum make of independent normal noise of standard deviation 1).

    Args:
        history: With the newest validation in it.
        last: The run is over.
    """
    return (*_stop(history), *(_unread(history) if last else ()))


def _stop(history: History) -> tuple[str, ...]:
    if not (_rising(history.validations) and not _rising(history.validations[:-1])):
        return ()
    best_step, best = min(history.validations, key=lambda point: point[1])
    now = history.validations[-1][1]
    return (
        f"the validation loss has risen: {now:.4g} now, {best:.4g} at step {best_step}, and above "
        f"that {RISES} times in a row; you can stop and use the best state, which is kept",
    )


def _rising(validations: list[tuple[int, float]]) -> bool:
    if len(validations) <= RISES:
        return False
    best_step, best = min(validations, key=lambda point: point[1])
    last = validations[-RISES:]
    margin = max(_noise([loss for _, loss in validations]), _SURELY * abs(best))
    return all(step > best_step and loss > best + margin for step, loss in last)


def _noise(losses: list[float]) -> float:
    bends = [
        abs(before - 2 * now + after)
        for before, now, after in zip(losses, losses[1:], losses[2:], strict=False)
    ]
    return float(1.48 * median(bends) / 6**0.5)


def _unread(history: History) -> tuple[str, ...]:
    """Returns what there is to say of a control task whose control changes next to nothing."""
    if not history.others:
        return ()
    own, other = history.validations[-1][1], history.others[-1][1]
    if other > own * (1 + SURELY_CONTROLLED):
        return ()
    return (
        f"the task hardly goes by its control: the validation loss is {own:.4g} with each "
        f"picture's own control and {other:.4g} with another picture's; train it longer (steps), "
        f"or faster (lr, lr_control)",
    )


def _control(config: TrainingConfig) -> list[str]:
    if not config.control:
        return []
    said = []
    if config.steps < FEW_STEPS_FOR_CONTROL:
        said.append(
            f"{config.steps} steps are few for a control task: in our trial nothing could be "
            f"judged before some {FEW_STEPS_FOR_CONTROL}"
        )
    if not METHODS[config.method].parts:
        said.append(
            f"method {config.method!r} adapts no layer, and a control that is only embedded hardly "
            f"controls: take diffscaler or lora"
        )
    return said


def _rates(config: TrainingConfig, base: int) -> list[str]:
    if not _has_rank(config) or config.optimizer == "prodigy":
        return []
    if 0 < base < SMALL_BASE and config.lr <= SLOW_FOR_SMALL:
        return [
            f"lr {config.lr:g} is low for a base of {base / 1e6:.1f} M parameters: small bases "
            f"learn best at 0.003 to 0.01"
        ]
    if base > LARGE_BASE and config.lr > FAST_FOR_LARGE:
        return [
            f"lr {config.lr:g} is high for a base of {base / 1e9:.1f} B parameters: 0.0003 to "
            f"0.001 is safer"
        ]
    return []


def _has_rank(config: TrainingConfig) -> bool:
    return "subspace" in METHODS[config.method].parts
