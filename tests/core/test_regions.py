"""Masks as factors on tokens and places: sizes, rows, exactness, and what is refused."""

import dataclasses

import pytest
import torch
from torch import Tensor

from diffscaler_core.affiner import ConvGeometry
from diffscaler_core.errors import DiffScalerError
from diffscaler_core.regions import Regions, TokenLayout

PICTURE = TokenLayout(1, 8, 12, patch=2)
JOINT = dataclasses.replace(PICTURE, text="first", roles=(("both", "joint"), ("text", "mean")))
UNET = TokenLayout(1, 9, 13, kind="unet", roles=(("text", "mean"),))
CONV = ConvGeometry((1, 1), (0, 0), (1, 1))


def left(height: int = 8, width: int = 12) -> Tensor:
    """A mask of the left half."""
    mask = torch.zeros(1, 1, height, width)
    mask[..., : width // 2] = 1
    return mask


def tokens(regions: Regions, name: str, *shape: int, **options: str) -> Tensor:
    return regions.gates(name, torch.zeros(*shape, 5), None, **options)


def test_a_token_gets_the_average_of_what_it_stands_for() -> None:
    mask = torch.rand(1, 1, 8, 12, generator=torch.Generator().manual_seed(0))
    got = tokens(Regions({0: mask}, PICTURE, 1), "layer", 2, 24)
    wanted = [
        float(mask[0, 0, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean())
        for i in range(4)
        for j in range(6)
    ]
    torch.testing.assert_close(got[0, :, 0], torch.tensor(wanted))
    assert got.shape == (1, 24, 1)


@pytest.mark.parametrize("size", [(8, 12), (1, 2), (64, 96), (61, 150), (1024, 1536)])
def test_one_stays_one_and_zero_stays_zero(size: tuple[int, int]) -> None:
    """Also where sizes do not divide: 0.99999 at a task's heart would be a task of its own."""
    for layout, lengths in ((PICTURE, (1, 24)), (UNET, (1, 117, 35, 12, 4, 2, 5))):
        for value in (0.0, 1.0):
            regions = Regions({0: torch.full((1, 1, *size), value)}, layout, 1)
            for n in lengths:
                assert bool((tokens(regions, "layer", 2, n) == value).all())
            for places in ((8, 12), (9, 13), (4, 6), (3, 5)):
                y = torch.zeros(2, 5, *places)
                assert bool((regions.gates("layer", y, CONV) == value).all())


def test_a_mask_of_pixels_is_the_same_as_one_of_latents() -> None:
    small = torch.rand(1, 1, 8, 12, generator=torch.Generator().manual_seed(0))
    large = small.repeat_interleave(8, -1).repeat_interleave(8, -2)
    got = [tokens(Regions({0: m}, PICTURE, 1), "layer", 1, 24) for m in (small, large)]
    torch.testing.assert_close(*got)


def test_a_patch_that_overhangs_averages_what_is_there() -> None:
    layout = TokenLayout(1, 7, 11, patch=2)
    mask = torch.zeros(1, 1, 7, 11)
    mask[..., -1] = mask[..., -1, :] = 1
    got = tokens(Regions({0: mask}, layout, 1), "layer", 1, 24)[0, :, 0].view(4, 6)
    assert bool((got[:, -1] == 1).all())
    assert bool((got[-1] == 1).all())
    assert not got[:-1, :-1].any()


def test_text_gets_the_mean_and_the_picture_comes_after_it() -> None:
    regions = Regions({0: left()}, JOINT, 1)
    half = [1.0, 1.0, 1.0, 0.0, 0.0, 0.0] * 4
    assert tokens(regions, "both", 2, 27)[0, :, 0].tolist() == [0.5] * 3 + half
    assert tokens(regions, "diffusion_model.both", 2, 27)[0, 3:, 0].tolist() == half
    assert tokens(regions, "image", 2, 24)[0, :, 0].tolist() == half
    assert tokens(regions, "text", 2, 24).tolist() == [[[0.5]]]  # as many, but text by its name
    assert tokens(regions, "image", 2).tolist() == [[[0.5]]]  # one vector a row
    assert tokens(regions, "image", 2, 1).tolist() == [[[0.5]]]
    after = Regions({0: left()}, dataclasses.replace(JOINT, text="last"), 1)
    assert tokens(after, "both", 2, 27)[0, :, 0].tolist() == half + [0.5] * 3


def test_references_and_filling_get_the_mean() -> None:
    half = [1.0, 1.0, 1.0, 0.0, 0.0, 0.0] * 4

    def gates(name: str, n: int, **facts: object) -> list[float]:
        layout = dataclasses.replace(JOINT, **facts)
        return tokens(Regions({0: left()}, layout, 1), name, 1, n)[0, :, 0].tolist()

    assert gates("image", 30, references="last") == half + [0.5] * 6
    assert gates("image", 30, references="first") == [0.5] * 6 + half
    assert gates("image", 32, multiple=32) == half + [0.5] * 8
    assert gates("both", 35, multiple=32) == [0.5] * 3 + half + [0.5] * 8
    assert gates("both", 35, references="first", multiple=32) == [0.5] * 3 + half + [0.5] * 8
    after = gates("both", 33, references="last", text_lengths=(3,))
    assert after == [0.5] * 3 + half + [0.5] * 6


def test_each_row_s_picture_follows_its_own_text() -> None:
    layout = dataclasses.replace(JOINT, text_lengths=(3, 5))
    half = [1.0, 1.0, 1.0, 0.0, 0.0, 0.0] * 4
    for mask in (left(), left().expand(2, -1, -1, -1)):
        got = tokens(Regions({0: mask}, layout, 1), "both", 2, 29)[..., 0].tolist()
        assert got == [[0.5] * 3 + half + [0.5] * 2, [0.5] * 5 + half]


def test_all_frames_have_the_same_mask() -> None:
    layout = TokenLayout(3, 8, 12, patch=2, text="first", roles=(("both", "joint"),))
    regions = Regions({0: left()}, layout, 1)
    one = tokens(Regions({0: left()}, PICTURE, 1), "layer", 1, 24)
    assert torch.equal(tokens(regions, "layer", 1, 72), one.repeat(1, 3, 1))
    assert torch.equal(tokens(regions, "both", 1, 75)[:, 3:], one.repeat(1, 3, 1))
    volume = regions.gates("layer", torch.zeros(2, 5, 3, 4, 6), ConvGeometry((1,) * 3, "same", ()))
    assert volume.shape == (1, 1, 1, 4, 6)
    assert torch.equal(volume.flatten(2).transpose(1, 2), one)


def test_a_u_net_s_levels_are_told_by_their_size() -> None:
    mask = torch.zeros(1, 1, 9, 13)
    mask[..., 8, 12] = 1  # the corner that overhangs at every level
    regions = Regions({0: mask}, UNET, 1)
    for (rows, columns), corner in zip(
        [(9, 13), (5, 7), (3, 4), (2, 2)], [1, 1, 1, 1 / 5], strict=True
    ):
        places = regions.gates("conv", torch.zeros(1, 5, rows, columns), CONV)[0, 0]
        line = tokens(regions, "attn", 1, rows * columns)[0, :, 0]
        assert torch.equal(places.flatten(), line)
        assert float(line[-1]) == pytest.approx(corner)
        assert not line[:-1].any()
    assert tokens(regions, "text", 1, 35).shape == (1, 1, 1)  # as many as the second level has
    assert tokens(regions, "attn", 1, 36).shape == (1, 1, 1)  # no level of that size


def test_a_convolution_over_tokens() -> None:
    regions = Regions({1: left()}, PICTURE, 2)
    got = regions.gates("layer", torch.zeros(2, 5, 24), ConvGeometry((1,), (0,), (1,)))
    assert torch.equal(got.transpose(1, 2), tokens(regions, "layer", 2, 24))


def test_a_task_without_a_mask_acts_everywhere() -> None:
    regions = Regions({1: left()}, JOINT, 3)
    for name, n in (("image", 24), ("both", 27), ("text", 5)):
        got = tokens(regions, name, 2, n)
        assert got.shape[-1] == 3
        assert bool((got[..., [0, 2]] == 1).all())
        assert float(got[..., 1].min()) < 1


def test_rows_have_their_own_masks() -> None:
    mask = torch.cat([left(), left().flip(-1)])
    regions = Regions({0: mask, 1: left()}, JOINT, 2)
    got = tokens(regions, "both", 2, 27)
    for row in range(2):
        alone = Regions({0: mask[row : row + 1], 1: left()}, JOINT, 2)
        assert torch.equal(got[row : row + 1], tokens(alone, "both", 1, 27))
    folded = tokens(regions, "image", 6, 24, row_layout="fold")
    assert torch.equal(folded, tokens(regions, "image", 2, 24).repeat_interleave(3, dim=0))
    places = regions.gates("image", torch.zeros(6, 5, 4, 6), CONV, "fold")
    assert torch.equal(places.flatten(2).transpose(1, 2), folded)
    flat = tokens(regions, "image", 1, 48, row_layout="flat")
    assert torch.equal(flat.view(2, 24, 2), tokens(regions, "image", 2, 24))
    text = tokens(regions, "text", 1, 10, row_layout="flat")
    assert torch.equal(text.view(2, 5, 2), torch.full((2, 5, 2), 0.5))


def test_a_list_of_samples_is_one_run_of_vectors() -> None:
    layout = dataclasses.replace(PICTURE, multiple=32, roles=(("embed", "list"),))
    mask = torch.cat([left(), left().flip(-1)])
    got = tokens(Regions({0: mask}, layout, 1), "embed", 64)
    assert got.shape == (64, 1, 1)
    rows = tokens(Regions({0: mask}, layout, 1), "image", 2, 32)
    assert torch.equal(got.view(2, 32, 1), rows)
    shared = tokens(Regions({0: left()}, layout, 1), "embed", 96)
    assert torch.equal(shared.view(3, 32, 1), rows[:1].expand(3, -1, -1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_gates_come_as_the_output_is(dtype: torch.dtype) -> None:
    regions = Regions({0: left()}, PICTURE, 1)
    got = regions.gates("layer", torch.zeros(2, 24, 5, dtype=dtype), None)
    assert got.dtype == dtype
    assert torch.equal(got.float(), tokens(regions, "layer", 2, 24))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float16, torch.float64])
def test_masks_of_any_dtype(dtype: torch.dtype) -> None:
    got = tokens(Regions({0: left().to(dtype)}, PICTURE, 1), "layer", 2, 24)
    assert torch.equal(got, tokens(Regions({0: left()}, PICTURE, 1), "layer", 2, 24))


def test_the_same_question_gets_the_same_tensor() -> None:
    regions = Regions({0: left()}, JOINT, 1)
    first = tokens(regions, "image.0", 2, 24)
    assert tokens(regions, "image.1", 2, 24) is first
    assert tokens(regions, "image.0", 2, 1) is not first


def test_compiled_code_has_the_same_gates() -> None:
    def run(y: Tensor, regions: Regions) -> Tensor:
        return y * regions.gates("both", y, None)

    compiled = torch.compile(run, backend="eager", fullgraph=True)
    y = torch.randn(2, 27, 1, generator=torch.Generator().manual_seed(0))
    for mask in (left(), left().flip(-1)):
        regions = Regions({0: mask}, JOINT, 1)
        assert torch.equal(compiled(y, regions), run(y, regions))


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({0: torch.ones(8, 12)}, r"\(1 or rows, 1, height, width\), got \(8, 12\)"),
        ({0: torch.ones(1, 3, 8, 12)}, r"got \(1, 3, 8, 12\)"),
        ({0: torch.ones(1, 1, 0, 12)}, r"got \(1, 1, 0, 12\)"),
        ({0: left() * 255}, "in 0..1, but this one .* holds 0 to 255"),
        ({0: left() - 1}, "holds -1 to 0"),
        ({0: left() * float("nan")}, "holds nan"),
        ({2: left()}, "for task 2, but 2 tasks are attached"),
        ({0: left().expand(2, -1, -1, -1), 1: left().expand(3, -1, -1, -1)}, "for 3 rows, .* 2"),
    ],
)
def test_a_mask_that_is_none_is_one_clear_error(masks: dict[int, Tensor], message: str) -> None:
    with pytest.raises(DiffScalerError, match=message):
        Regions(masks, PICTURE, 2)


def test_masks_for_other_rows_than_the_texts_are_refused() -> None:
    layout = dataclasses.replace(JOINT, text_lengths=(3, 5))
    with pytest.raises(DiffScalerError, match="for 3 rows, but there are 2"):
        Regions({0: left().expand(3, -1, -1, -1)}, layout, 1)


def test_rows_that_cannot_be_told_apart_are_refused() -> None:
    regions = Regions({0: left().expand(2, -1, -1, -1)}, JOINT, 1)
    for shape, row_layout in (((3, 24), "batch"), ((4, 24), "batch"), ((5, 24), "fold")):
        with pytest.raises(DiffScalerError, match="masks are set for 2 rows, but 'image'"):
            tokens(regions, "image", *shape, row_layout=row_layout)
    with pytest.raises(DiffScalerError, match="do not tell rows apart"):
        tokens(regions, "text", 1, 11, row_layout="flat")


def test_another_number_of_tokens_is_refused() -> None:
    regions = Regions({0: left()}, JOINT, 1)
    for name, n in (("image", 20), ("image", 25), ("both", 20)):
        with pytest.raises(DiffScalerError, match=f"'{name}' ran on {n} tokens a row"):
            tokens(regions, name, 2, n)
