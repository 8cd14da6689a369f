import pytest
import torch
from PIL import Image

from diffscaler_core.errors import DiffScalerError
from diffscaler_core.training import encode_folder, find_pictures
from diffscaler_core.training.data import load_picture, vae_decode, vae_encode


def same(pixels):
    return pixels


def test_class_folders_and_captions_name_the_prompts(pictures):
    Image.new("RGB", (16, 16)).save(pictures / "loose.png")
    (pictures / "blue" / "1.txt").write_text("a blue one\n")
    prompts = [picture.prompt for picture in find_pictures(pictures, "mine")]
    assert prompts == ["blue", "a blue one", "blue", "mine", "red", "red", "red"]


def test_a_folder_becomes_latents_with_their_prompts(pictures):
    data = encode_folder(pictures, 16, same, flip=True, batch=4)
    assert data.latents.shape == (2, 6, 3, 16, 16)
    assert data.prompts == ("blue", "red")
    assert data.index.tolist() == [0, 0, 0, 1, 1, 1]
    assert torch.equal(data.latents[1], data.latents[0].flip(-1))
    assert not torch.equal(data.latents[1], data.latents[0])
    assert float(data.latents.min()) >= -1
    assert float(data.latents.max()) == 1


def test_batches_are_the_same_for_the_same_seed(pictures):
    data = encode_folder(pictures, 16, same, flip=True)
    one, two = (data.batch(8, torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])


def test_transparent_pictures_lie_on_white(tmp_path):
    Image.new("RGBA", (16, 16), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert bool((load_picture(tmp_path / "clear.png", 16) == 1).all())
    assert load_picture(tmp_path / "clear.png", 16, channels=1).shape == (1, 16, 16)


def test_an_empty_folder_is_refused_by_name(tmp_path):
    with pytest.raises(DiffScalerError, match="holds no picture"):
        encode_folder(tmp_path, 16, same)
    with pytest.raises(DiffScalerError, match="is no folder"):
        encode_folder(tmp_path / "nowhere", 16, same)


def test_bad_pictures_are_all_named_before_training(pictures):
    (pictures / "red" / "broken.png").write_bytes(b"no picture at all")
    Image.new("RGB", (4, 40)).save(pictures / "red" / "thin.png")
    with pytest.raises(DiffScalerError, match="2 of 8 pictures cannot be used") as caught:
        encode_folder(pictures, 16, same)
    assert "red/broken.png (cannot be read" in str(caught.value)
    assert "red/thin.png (4x40 is too small for 16x16)" in str(caught.value)
    data = encode_folder(pictures, 16, same, skip_bad=True)
    assert len(data) == 6
    assert len(data.skipped) == 2


def test_a_truncated_picture_is_refused(pictures):
    whole = (pictures / "red" / "0.png").read_bytes()
    (pictures / "red" / "0.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DiffScalerError, match=r"1 of 6 .*red/0\.png"):
        encode_folder(pictures, 16, same)


def test_a_folder_of_only_bad_pictures_is_refused_even_when_skipping(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"")
    with pytest.raises(DiffScalerError, match="1 of 1 pictures"):
        encode_folder(tmp_path, 16, same, skip_bad=True)


def test_a_vae_that_overflows_is_named(pictures):
    with pytest.raises(DiffScalerError, match="VAE gave NaN"):
        encode_folder(pictures, 16, lambda pixels: pixels / 0)


def test_latents_are_scaled_and_shifted_as_the_pipelines_do():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, scaling_factor=1.5, shift_factor=0.25
    ).eval()
    pixels = torch.rand(2, 3, 8, 8) * 2 - 1
    with torch.no_grad():
        latents = vae_encode(vae)(pixels)
        mean = vae.encode(pixels).latent_dist.mean
        torch.testing.assert_close(latents, (mean - 0.25) * 1.5)
        shown = vae_decode(vae)(latents)
        torch.testing.assert_close(shown, vae.decode(mean).sample.clamp(-1, 1))
