"""Evaluation on the pocket base with its own tasks, a few small pictures each."""

import csv
import dataclasses
import io
import json
import math
import shutil

import diffusers
import pytest
import torch
from PIL import Image

from diffscaler_core import DiffScalerError, combine_tasks, load_task, new_task
from diffscaler_core.evaluation import (
    EvaluationReport,
    EvaluationSettings,
    FeatureNet,
    Row,
    drift,
    evaluate,
)
from diffscaler_core.evaluation.drift import moved
from diffscaler_core.evaluation.memory import allocated
from diffscaler_core.evaluation.pictures import labelled_grid, load_strip, save_strip
from diffscaler_core.evaluation.reference import other_prompts, prompts_of
from diffscaler_core.evaluation.sampling import Plan, drawn, turns
from diffscaler_core.training import Denoiser, as_denoiser, validation_loss

from .conftest import POCKET, ROOT

INK = ROOT / "assets" / "examples" / "ink"
QUICK = EvaluationSettings(
    pictures=8, steps=2, batch=4, size=64, neighbours=3, validation=4, drift=2, columns=3
)
GOOD = dataclasses.replace(QUICK, steps=4, size=None)  # as the base was trained: 128 pixels
MEANS = FeatureNet("colours", 6, lambda x: torch.cat([x.mean((2, 3)), x.std((2, 3))], 1))


def changed(**values):
    return dataclasses.replace(QUICK, **values)


@pytest.fixture(scope="module")
def report(pocket, words, ink, net) -> EvaluationReport:
    return evaluate(pocket, {"ink": ink}, INK, net, GOOD, words=words)


@pytest.fixture(scope="module")
def small(pocket, words, ink, net) -> EvaluationReport:
    return evaluate(pocket, {"ink": ink}, INK, net, QUICK, words=words)


def same(one: Row, two: Row) -> bool:
    """Says whether two rows agree in all but time."""
    timed = {"seconds": None, "times_base": None, "peak": None}
    return dataclasses.replace(one, **timed) == dataclasses.replace(two, **timed)


def test_a_table_holds_the_references_the_base_and_the_task(report, ink, pocket):
    ceiling, base, task = report.rows
    assert [row.kind for row in report.rows] == ["ceiling", "base", "task"]
    assert (task.name, task.reference, task.pictures, task.references) == ("ink", "ink", 8, 20)
    assert (ceiling.pictures, ceiling.seconds, ceiling.validation_loss) == (20, None, None)
    assert ceiling.frechet < task.frechet < base.frechet
    whole = sum(p.numel() for p in pocket.model.parameters())
    assert task.parameters == ink.num_parameters
    assert task.percent == pytest.approx(100 * ink.num_parameters / whole)
    assert task.bytes == ink.nbytes
    assert task.seconds > 0
    assert task.times_base == pytest.approx(task.seconds / base.seconds)
    assert task.peak > 2**20
    assert task.validation_loss < base.validation_loss
    assert base.parameters is None
    assert [len(pictures) for pictures in report.pictures] == [3, 3, 3]


def test_strength_0_moves_nothing_and_strength_1_does(report):
    task = report.rows[2]
    assert task.drift_off == 0
    assert task.drift > 0
    assert 0 < task.drift_pixels < 1


def test_a_task_that_does_nothing_is_the_base(pocket, words, net):
    nothing = new_task(pocket.model, name="nothing", rank=2)
    _, base, task = evaluate(pocket, {"nothing": nothing}, INK, net, QUICK, words=words).rows
    assert task.frechet == base.frechet
    assert task.validation_loss == base.validation_loss
    assert (task.drift, task.drift_pixels, task.drift_off) == (0, 0, 0)


def test_a_broken_task_scores_worse(report, pocket, words, ink, net):
    broken = combine_tasks([ink], [6.0])
    row = evaluate(pocket, {"broken": broken}, INK, net, GOOD, words=words).rows[2]
    good = report.rows[2]
    assert row.frechet > 1.5 * good.frechet
    assert row.kernel > good.kernel
    assert row.validation_loss > good.validation_loss
    assert row.drift > good.drift


def test_drift_sees_what_strength_0_changes(pocket, words, ink, net, monkeypatch):
    # A carrier whose strength 0 is not the base: the figure must not be 0.
    prompts = prompts_of(pocket, ("cat", "dog"), None, words)
    plan = Plan(prompts, torch.arange(2), (16, 8, 8))
    attach = Denoiser.attach

    def leaky(self, tasks):
        worn = attach(self, tasks)
        monkeypatch.setattr(worn, "set_weights", lambda weights: None)
        return worn

    with pocket.held():
        assert drift(pocket, ink, plan, net, QUICK).off == 0
        monkeypatch.setattr(Denoiser, "attach", leaky)
        assert drift(pocket, ink, plan, net, QUICK).off > 0.01


def test_moved_is_in_units_of_the_distance_of_two_pictures():
    before = torch.tensor([[0.0, 0.0], [3.0, 4.0]])  # 5 apart
    assert moved(before, before + torch.tensor([1.0, 0.0])) == pytest.approx(1 / 5)
    assert moved(before, before) == 0
    assert math.isnan(moved(before[:1], before[:1]))


def test_the_same_again_and_in_other_batches(small, pocket, words, ink, net):
    again = evaluate(pocket, {"ink": ink}, INK, net, QUICK, words=words)
    assert all(same(one, two) for one, two in zip(small.rows, again.rows, strict=True))
    other = evaluate(pocket, {"ink": ink}, INK, net, changed(batch=8, drift=0), words=words).rows[2]
    assert other.frechet == pytest.approx(small.rows[2].frechet, rel=1e-3)
    assert other.drift is None
    seeded = evaluate(pocket, {"ink": ink}, INK, net, changed(seed=1, drift=0), words=words).rows[2]
    assert seeded.frechet != small.rows[2].frechet


def test_pictures_start_from_the_noise_of_their_number(pocket, words):
    prompts = prompts_of(pocket, ("cat", "dog", "sun"), None, words)
    plan = Plan(prompts, torch.tensor([0, 1, 0, 0]), (16, 8, 8))
    with pocket.held():
        all_at_once = torch.cat(list(drawn(pocket, plan, changed(batch=4))))
        one_by_one = torch.cat(list(drawn(pocket, plan, changed(batch=1))))
    torch.testing.assert_close(all_at_once, one_by_one, atol=1e-3, rtol=0)
    assert all_at_once.shape == (4, 3, 64, 64)
    for i, j in ((0, 2), (0, 3), (2, 3)):  # one word, other noise
        assert (all_at_once[i] - all_at_once[j]).abs().mean() > 0.01
    assert all_at_once.abs().max() <= 1


def test_turns_take_each_reference_in_turn():
    found = turns(5, 12, seed=0)
    assert sorted(found[:5].tolist()) == list(range(5))
    assert sorted(found[5:10].tolist()) == list(range(5))
    assert len(found) == 12
    assert found[:5].tolist() != turns(5, 5, seed=1).tolist()
    assert torch.equal(found[:7], turns(5, 7, seed=0))  # fewer pictures are the first of more


def test_interrupted_it_goes_on_after_the_last_row(small, pocket, words, ink, net, tmp_path):
    def interrupt(what, done, total):
        if what == "ink: ink" and done >= 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(pocket, {"ink": ink}, INK, net, QUICK, words=words, folder=tmp_path,
                 on_progress=interrupt)  # fmt: skip
    rows = tmp_path / "rows"
    assert len(list(rows.glob("*.json"))) == 2
    seen = set()
    again = evaluate(pocket, {"ink": ink}, INK, net, QUICK, words=words, folder=tmp_path,
                     on_progress=lambda what, done, total: seen.add(what))  # fmt: skip
    assert "ink: ink" in seen
    assert not {"ink: base", "ink: through the VAE"} & seen
    assert all(same(one, two) for one, two in zip(small.rows, again.rows, strict=True))
    seen.clear()
    third = evaluate(pocket, {"ink": ink}, INK, net, QUICK, words=words, folder=tmp_path,
                     on_progress=lambda what, done, total: seen.add(what))  # fmt: skip
    assert seen == {"ink: reading pictures"}
    assert third.rows == again.rows
    for one, two in zip(third.pictures, again.pictures, strict=True):
        torch.testing.assert_close(
            torch.stack(list(one)), torch.stack(list(two)), atol=0.01, rtol=0
        )


def test_rows_of_something_else_are_not_taken_over(pocket, words, ink, tmp_path):
    folder, quick = tmp_path / "out", changed(drift=0, validation=0, pictures=4)
    copy = tmp_path / "pictures"
    shutil.copytree(INK, copy)

    def measured(task, settings=quick, net=MEANS):
        seen = set()
        evaluate(pocket, {"ink": task}, copy, net, settings, words=words, folder=folder,
                 on_progress=lambda what, done, total: seen.add(what))  # fmt: skip
        return {what.partition(": ")[2] for what in seen} & {"base", "ink"}

    assert measured(ink) == {"base", "ink"}
    assert measured(ink) == set()
    other = {n: {part: t * 0.5 for part, t in own.items()} for n, own in ink.layers.items()}
    assert measured(ink.replace(layers=other)) == {"ink"}  # other numbers, all else the same
    assert measured(ink, changed(drift=0, validation=0, pictures=4, seed=3)) == {"base", "ink"}
    assert measured(ink, net=FeatureNet("others", 6, MEANS.features, key="o")) == {"base", "ink"}
    Image.new("RGB", (64, 64), "red").save(copy / "cat.png")
    assert measured(ink) == {"base", "ink"}
    for file in (folder / "rows").glob("*.json"):
        file.write_text(file.read_text()[:40])  # as after a full disk
    assert measured(ink) == {"base", "ink"}


def test_tasks_with_other_references_get_a_base_row_each(pocket, words, ink, tmp_path):
    quick = changed(drift=0, validation=0, pictures=4)
    neon = load_task(POCKET / "diffscaler" / "neon.safetensors")
    both = evaluate(pocket, {"a": ink, "b": neon}, INK, MEANS, quick, words=words)
    assert [row.name for row in both.rows] == ["references through the VAE", "base", "a", "b"]
    other = tmp_path / "other"
    shutil.copytree(INK, other)
    (other / "cat.png").unlink()
    apart = evaluate(pocket, {"a": ink, "b": neon}, {"a": INK, "b": other}, MEANS, quick,
                     words=words)  # fmt: skip
    assert [(row.reference, row.name) for row in apart.rows if row.kind != "ceiling"] == [
        ("ink", "base"), ("ink", "a"), ("other", "base"), ("other", "b"),
    ]  # fmt: skip
    assert apart.references == ("ink", "other")
    assert [label for label, _ in apart.labelled()][:3] == [
        "ink: references",
        "ink: base",
        "ink: a",
    ]


def fruit_pictures(folder, names, count=2):
    for i, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for j in range(count):
            image = Image.new("RGB", (64, 64), (40 * i, 200 - 30 * i, 90))
            image.paste((255, 255, 255), (4 * j, 8, 30, 40))
            image.save(folder / name / f"{j}.png")
    return folder


def test_a_tasks_own_prompts_are_used(pocket, words, tmp_path):
    fruits = load_task(POCKET / "diffscaler" / "fruits.safetensors")
    where = fruit_pictures(tmp_path / "fruits", ("banana", "cherries"))
    quick = changed(pictures=4)
    _, base, task = evaluate(pocket, {"fruits": fruits}, where, MEANS, quick, words=words).rows
    prompts = prompts_of(pocket, ("banana", "cherries"), fruits, words)
    torch.testing.assert_close(
        prompts.context[0], fruits.prompt("banana")[0][0].float(), check_dtype=False
    )
    assert task.validation_loss != base.validation_loss
    assert task.drift_off == 0


def test_a_control_task_draws_after_its_references_controls(pocket, words, tmp_path):
    task = load_task(POCKET / "diffscaler" / "silhouette.safetensors")
    shown = ROOT / "assets" / "examples" / "control"
    for name in ("cat", "rocket", "star", "guitar"):
        for folder, file in (("p", f"{name}.png"), ("p_control", f"silhouette_{name}.png")):
            (tmp_path / folder / name).mkdir(parents=True)
            shutil.copy(shown / file, tmp_path / folder / name / "0.png")
    where, quick = tmp_path / "p", changed(pictures=4, batch=2, columns=4, steps=4, size=128)
    settings = dataclasses.replace(quick, guidance=1.0)
    report = evaluate(pocket, {"silhouette": task}, where, MEANS, settings, words=words)
    references, base, controlled = (torch.stack(list(p)) for p in report.pictures)
    # Each result overlaps with the silhouette of the reference in its own column.
    masks = []
    for picture in references:
        corner = picture[:, :4, :4].mean((1, 2), keepdim=True)
        masks.append(((picture - corner).abs().amax(0) > 0.3).float())

    def inside(pictures):
        corners = pictures[:, :, :4, :4].mean((2, 3), keepdim=True)
        ink = (pictures - corners).abs().amax(1)
        return float(torch.stack([i[m > 0].mean() - i[m == 0].mean()
                                  for i, m in zip(ink, masks, strict=True)]).mean())  # fmt: skip

    assert inside(controlled) > inside(base)
    assert report.rows[2].drift_off == 0


def test_validation_is_the_trainers_own(pocket, words, ink, small):
    from diffscaler_core.training import encode_folder, prompts_for

    data = encode_folder(INK, 64, pocket.encode)
    some = data.select(torch.linspace(0, len(data) - 1, 4).round().int().tolist())
    told = prompts_for(pocket, data.prompts, "stored", words=words)
    expected = validation_loss(pocket, some, told, ink, batch=4)
    assert small.rows[2].validation_loss == pytest.approx(expected, rel=1e-5)


def test_bases_of_class_labels_and_of_pixels_are_measured_too(tmp_path):
    where = fruit_pictures(tmp_path / "p", ("1", "3"), 3)
    torch.manual_seed(0)
    dit = diffusers.DiTTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=8, num_layers=1,
        num_attention_heads=2, attention_head_dim=8, num_embeds_ada_norm=10,
    )  # fmt: skip
    unet = diffusers.UNet2DModel(
        sample_size=16, in_channels=3, out_channels=3, layers_per_block=1,
        block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip

    class Pipe:
        def __init__(self, scheduler, vae=None, transformer=None, unet=None):
            self.scheduler, self.vae, self.transformer, self.unet = (
                scheduler,
                vae,
                transformer,
                unet,
            )

    vae = diffusers.AutoencoderTiny(
        latent_channels=4, encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), scaling_factor=1.0, shift_factor=0.0,
    ).eval()  # fmt: skip
    quick = changed(size=16, pictures=6)
    for pipe in (
        Pipe(diffusers.DDIMScheduler(), vae, dit),
        Pipe(diffusers.DDPMScheduler(), unet=unet),
    ):
        task = new_task(pipe.transformer or pipe.unet, name="new", rank=2)
        ceiling, base, row = evaluate(pipe, {"new": task}, where, MEANS, quick).rows
        assert row.frechet == base.frechet
        assert row.drift_off == 0
        assert math.isfinite(row.validation_loss)
        if pipe.vae is None:
            assert ceiling.frechet == pytest.approx(0, abs=1e-6)


def test_other_prompts_are_the_bases_words_that_are_not_the_tasks(words, ink):
    found = other_prompts(ink, ("cat", "dog"), words, 5)
    assert len(found) == 5
    assert not {"cat", "dog", ""} & set(found)
    assert set(found) <= set(words.prompts)
    assert other_prompts(ink, words.prompts, words, 5) == ("",)
    assert other_prompts(ink, (), None, 5) == ("",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(tasks={}), "no task to evaluate"),
        (dict(references={"neon": INK}), "'ink' need reference pictures"),
        (dict(references={"ink": INK, "neon": INK}), "'neon' have pictures, but are no tasks"),
        (dict(references="nowhere"), "'nowhere' is no folder"),
        (
            dict(settings=changed(neighbours=20, pictures=40)),
            "holds 20 pictures; with neighbours 20",
        ),
        (dict(settings=changed(size=60)), "size 60 must be a multiple of 16"),
        (dict(settings=changed(prompts=("unicorn",))), "unicorn"),
        (dict(settings=changed(drift_prompts=("unicorn",))), "unicorn"),
        (dict(words=None), "nobody knows the prompt 'balloon'"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(pocket, words, ink, change, message):
    told = dict(tasks={"ink": ink}, references=INK, settings=QUICK, words=words, **{})
    told.update(change)
    settings = told.pop("settings")
    with pytest.raises(DiffScalerError, match=message) as error:
        evaluate(pocket, told["tasks"], told["references"], MEANS, settings, words=told["words"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "values", [dict(pictures=3), dict(batch=0), dict(steps=0), dict(drift=1), dict(shift=0.0)]
)
def test_numbers_without_sense_are_refused(values):
    with pytest.raises(DiffScalerError, match=next(iter(values))):
        changed(**values)


def row_of(**values) -> Row:
    numbers = {f.name: 0.5 for f in dataclasses.fields(Row) if f.type == "float"}
    told = {"name": "ink", "kind": "task", "reference": "r", "pictures": 8, "references": 9}
    return Row(**{**told, **numbers, **values})


def test_a_report_says_what_it_was_measured_with():
    report = EvaluationReport(QUICK, "net", 8, "a note").with_row(row_of(), [])
    for told in ("net", "8 features", "a note", "8 pictures", "9 of r", "seed 0"):
        assert told in report.caption
    assert "singular" in report.warnings[0]
    many = EvaluationReport(QUICK, "net", 8).with_row(row_of(pictures=50, references=20), [])
    assert "biased" in many.warnings[0]
    enough = EvaluationReport(QUICK, "net", 8).with_row(row_of(pictures=80, references=80), [])
    assert enough.warnings == ()
    defect = enough.with_row(row_of(drift_off=0.25, pictures=80, references=80), [])
    assert "0.25" in defect.warnings[0]
    assert "defect" in defect.warnings[0]


def test_a_report_becomes_files(report, tmp_path):
    report.save(tmp_path)
    table = (tmp_path / "table.md").read_text()
    assert table.count("\n| ") >= 4
    assert report.caption in table
    rows = list(csv.DictReader(io.StringIO((tmp_path / "table.csv").read_text())))
    assert [row["name"] for row in rows] == ["references through the VAE", "base", "ink"]
    assert float(rows[2]["frechet"]) == report.rows[2].frechet
    told = json.loads((tmp_path / "table.json").read_text())
    assert Row.of(told["rows"][2]) == report.rows[2]
    assert told["network"]["name"] == "pocket features"
    with Image.open(tmp_path / "grid.png") as image:
        assert image.height == 3 * 128 + 2 * 4
        assert image.width > 3 * 128
    assert not list(tmp_path.glob(".*"))


def test_nan_is_null_in_files():
    told = row_of(drift=math.nan).plain()
    assert told["drift"] is None
    json.dumps(told, allow_nan=False)


def test_a_grid_has_a_row_per_label():
    red = torch.tensor([1.0, -1, -1]).view(3, 1, 1).expand(3, 32, 32)
    page = labelled_grid([("references", [red, -red]), ("a task", [red])])
    assert page.height == 2 * 32 + 4
    right = page.width - 64
    assert page.getpixel((right + 8, 16)) == (255, 0, 0)
    assert page.getpixel((right + 40, 16)) == (0, 255, 255)
    assert page.getpixel((right + 8, 50)) == (255, 0, 0)
    assert page.getpixel((right + 40, 50)) == (255, 255, 255)
    label = page.crop((0, 0, right, 32))
    assert label.convert("L").getextrema()[0] < 100  # something is written there


def test_strips_come_back(tmp_path):
    pictures = [torch.full((3, 16, 16), value) for value in (-1.0, 0.0, 1.0)]
    save_strip(tmp_path / "strip.png", pictures)
    again = load_strip(tmp_path / "strip.png")
    torch.testing.assert_close(torch.stack(again), torch.stack(pictures), atol=0.01, rtol=0)
    assert load_strip(tmp_path / "none.png") is None
    (tmp_path / "broken.png").write_bytes(b"no picture")
    assert load_strip(tmp_path / "broken.png") is None


def test_memory_is_counted_to_the_byte():
    found = allocated(lambda: torch.zeros(1000).add(1).sum(), "cpu")
    assert 8000 <= found.peak <= 8000 + 256


def test_the_base_is_what_it_was(pocket, words, ink):
    x, t = torch.randn(1, 16, 8, 8), torch.tensor([500.0])
    told = prompts_of(pocket, ("cat",), None, words)(torch.tensor([0]))
    modes = [module.training for module in pocket.model.modules()]
    with torch.no_grad():
        before = pocket(x, t, told)
        evaluate(pocket, {"ink": ink}, INK, MEANS, changed(pictures=4), words=words)
        assert torch.equal(pocket(x, t, told), before)
    assert [module.training for module in pocket.model.modules()] == modes
    assert isinstance(as_denoiser(pocket), Denoiser)
