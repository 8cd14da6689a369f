import io
import math

import pytest
from PIL import Image

pytest.importorskip("matplotlib")

from diffscaler_core.training.curves import draw_curves, running_mean
from diffscaler_core.training.progress import History, Progress
from diffscaler_core.training.run_folder import RunFolder


def history_of(count=120, every=20):
    history = History()
    for step in range(1, count + 1):
        history.add(step, 1 / step + (math.nan if step == 7 else 0.1), [0.1, 0.2, 0.3, 0.4])
        if every and step % every == 0:
            history.validated(step, 0.1 + abs(step - 60) / 100)
    return history


def drawn(history, **more):
    file = io.BytesIO()
    draw_curves(history, file, **more)
    image = Image.open(file)
    image.load()
    return image


def colours(image):
    return {colour for _, colour in image.convert("RGB").getcolors(2**20)}


def test_validation_is_drawn_and_the_best_marked():
    orange = (0xD5, 0x5E, 0x00)
    assert orange in colours(drawn(history_of()))
    assert orange not in colours(drawn(history_of(every=0)))


def test_a_controls_worth_is_drawn_beside_the_validation():
    pink, history = (0xCC, 0x79, 0xA7), history_of()
    assert pink not in colours(drawn(history))
    history.others = [(step, loss + 0.2) for step, loss in history.validations]
    assert pink in colours(drawn(history))


def test_bands_and_rate_make_it_taller():
    log = [{"step": s, "lr": 1 / s, "bands": [0.1, None, 0.3, 0.4]} for s in range(1, 50)]
    plain, full = drawn(history_of()), drawn(history_of(), log=log, title="flowers")
    assert full.height > plain.height
    assert full.width == plain.width


@pytest.mark.parametrize(
    "history", [History(), history_of(1), {}, {"a": history_of(), "b": History()}]
)
def test_a_short_or_empty_run_is_drawn_too(history):
    assert drawn(history).width > 500


def test_the_running_mean_is_the_one_that_runs_report():
    history = history_of()
    history.losses = [(s, v) for s, v in history.losses if math.isfinite(v)]
    told = History()
    for step, loss in history.losses:
        told.add(step, loss, ())
    assert running_mean(told.losses)[-1][1] == pytest.approx(told.mean_loss)


def test_a_run_folder_draws_from_its_own_log(tmp_path):
    folder, history = RunFolder(tmp_path), History()
    for step in range(1, 30):
        history.add(step, 1 / step, [0.5] * 4)
        bands = tuple(history.bands)
        folder.log(Progress(step, 30, 1 / step, history.mean_loss, bands=bands, learning_rate=0.1))
    path = folder.curve({"flowers": history})
    with Image.open(path) as image:
        assert image.height > 700  # with bands and learning rate
