"""The Python of every page runs as it stands, one block after the other, and does what it says.

Where a page trains or measures for minutes, some of its numbers are made smaller first, and
pictures are drawn in few steps.
"""

import functools
import re
import runpy

import numpy as np
import pytest
import torch

from .pages import PAGES, ROOT, blocks, pages_with

pytest.importorskip("diffusers")

#: Page -> the numbers that are made smaller; each must stand there.
SMALLER = {
    "docs/auto_rank.md": {"128": "32"},
    "docs/evaluation.md": {
        "pictures=256": "pictures=6, steps=2, size=64, validation=2, drift=2",
    },
    "docs/training.md": {"steps=600": "steps=2, batch=2, sample_steps=1", "128": "32"},
}
#: Page -> libraries that it needs beside diffusers.
NEEDS = {"docs/peft.md": "peft"}


def given(page):
    """Returns the names that a page's blocks take for granted."""
    if page != "README.md":
        return {}
    left = np.zeros((64, 64), dtype=np.float32)
    left[:, :32] = 1
    model = runpy.run_path(str(ROOT / "tests/diffusers/tiny_models.py"))["tiny_model"]("sd3")
    return {"model": model, "left": left, "right": 1 - left}


@pytest.fixture
def few_steps(monkeypatch):
    """Makes the pocket base draw in three steps, whatever it is told."""
    from diffusers import StableDiffusion3Pipeline

    call = StableDiffusion3Pipeline.__call__

    @functools.wraps(call)
    def quick(self, *args, **kwargs):
        return call(self, *args, **kwargs | {"num_inference_steps": 3})

    monkeypatch.setattr(StableDiffusion3Pipeline, "__call__", quick)


def readme(names, here):
    assert [len(names["images"]), names["image"].size] == [4, (128, 128)]
    assert names["attachment"] is not None


def auto_rank(names, here):
    ranks = {n: len(own.get("down", ())) for n, own in names["task"].layers.items()}
    assert ranks == {f"transformer.{n}": r for n, r in names["choice"].ranks.items()}


def control(names, here):
    assert len(names["images"]) == 2


def convert(names, here):
    assert names["pipe"].get_active_diffscalers() == ["mine"]
    assert names["task"].info["imported"]["naming"] == "ComfyUI"


def evaluation(names, here):
    assert len(names["report"].rows) == 3


def experts(names, here):
    assert names["latents"].shape == (4, 16, 16, 16)
    assert torch.isfinite(names["latents"]).all()
    assert names["both"].rows_run == 4 * 4


def features(names, here):
    assert len(names["seen"]) == 3
    assert {seen.shape for seen in names["seen"].values()} == {(4, 192)}


def extract(names, here):
    assert 0 < names["found"].report.kept < 1
    assert names["smaller"].is_exact
    assert {len(t["down"]) for t in names["grown"].layers.values()} == {16}


def guidance(names, here):
    assert names["image"].size == (128, 128)
    blue, red = (np.asarray(names["image"])[..., c].mean() for c in (2, 0))
    assert blue > red


def how_it_works(names, here):
    assert names["by_hand"].shape == (3, 4)


def many_tasks(names, here):
    assert [len(names["images"]), len(names["drawn"])] == [4, 3]
    assert names["image"].size == (128, 128)


def methods(names, here):
    assert names["task"].classes == {"tulip": 1001, "daisy": 1002}
    side = names["images"][0].size[0]
    assert [len(names["images"]), names["large"].size] == [3, (2 * side, 2 * side)]


def peft(names, here):
    files = ("mine.safetensors", "mine_too.safetensors")
    one, two = (dict(names["load_task"](here / "out" / name).layers) for name in files)
    assert all(torch.equal(t, two[layer][n]) for layer, own in one.items() for n, t in own.items())
    assert any(bool(own["up"].any()) for own in one.values())
    assert names["pipe"].get_active_diffscalers() == ["mine"]


def refine(names, here):
    assert names["refined"].size == names["coarse"].size
    assert names["refined"].tobytes() != names["coarse"].tobytes()


def start_diffusers(names, here):
    drawn = [names[name] for name in ("image", "half", "both")]
    assert len({np.asarray(picture).tobytes() for picture in drawn}) == 3
    assert len(names["images"]) == 3
    assert names["pipe"].get_list_diffscalers() == {}


def time_ranges(names, here):
    assert names["both"].windows.edges == names["late"].windows.edges == (0.0,)
    assert len(names["experts"].windows.edges) == 3


def translate(names, here):
    pixels = np.asarray(names["image"]).astype(int)
    assert pixels.shape == (128, 128, 3)
    assert abs(pixels[..., 0] - pixels[..., 2]).mean() < 40  # ink is nearly grey, the cat is not


def which_task(names, here):
    assert names["found"].answer == "ink"
    assert names["found"].forwards < names["found"].full_forwards


def training(names, here):
    assert (here / "flowers.safetensors").is_file()
    assert (here / "runs" / "python" / "log.jsonl").is_file()


#: Page -> what must be true at its end.
AFTERWARDS = {
    "README.md": readme,
    "docs/auto_rank.md": auto_rank,
    "docs/control.md": control,
    "docs/convert.md": convert,
    "docs/evaluation.md": evaluation,
    "docs/experts.md": experts,
    "docs/extract.md": extract,
    "docs/features.md": features,
    "docs/guidance.md": guidance,
    "docs/how_it_works.md": how_it_works,
    "docs/many_tasks.md": many_tasks,
    "docs/methods.md": methods,
    "docs/peft.md": peft,
    "docs/refine.md": refine,
    "docs/start_diffusers.md": start_diffusers,
    "docs/time_ranges.md": time_ranges,
    "docs/training.md": training,
    "docs/translate.md": translate,
    "docs/which_task.md": which_task,
}


def test_the_tables_name_pages_with_python():
    assert AFTERWARDS.keys() == set(pages_with("python"))
    assert SMALLER.keys() | NEEDS.keys() <= AFTERWARDS.keys()


@pytest.mark.parametrize("page", pages_with("python"))
def test_pipelines_get_their_methods_on_the_page_itself(page):
    """A page that ran before may have imported the plugin, so running alone would not tell."""
    code = "".join(block.text for block in blocks(page, "python"))
    used = re.search(r"\b\w*pipe\.\w*diffscaler", code)
    if used or "TaskBank(pipe" in code:
        assert "import diffscaler_core.pipelines" in code[: used.start() if used else None]


@pytest.mark.slow
@pytest.mark.parametrize("page", pages_with("python"))
def test_the_python_of_a_page_runs(page, here, few_steps, monkeypatch):
    if page in NEEDS:
        pytest.importorskip(NEEDS[page], minversion="0.18")
    monkeypatch.setattr("diffscaler_core.training.rank_choice.LOOKS", 4)
    found, names = blocks(page, "python"), given(page)
    for old in SMALLER.get(page, {}):
        assert any(old in block.text for block in found), f"{page} says {old} no more"
    for block in found:
        code = block.text
        for old, new in SMALLER.get(page, {}).items():
            code = code.replace(old, new)
        # blank lines before it, so that an error names the page's own line
        exec(compile("\n" * block.line + code, str(PAGES[page]), "exec"), names)
        if hasattr(names.get("pipe"), "set_progress_bar_config"):
            names["pipe"].set_progress_bar_config(disable=True)
    AFTERWARDS[page](names, here)
