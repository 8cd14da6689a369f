import io
import tarfile
from itertools import chain

import pytest
import torch
from PIL import Image

from diffscaler_core.errors import DiffScalerError

datasets = pytest.importorskip("datasets", reason="the library datasets is not installed")

from diffscaler_core.training.data import streaming  # noqa: E402
from diffscaler_core.training.data.streaming import stream  # noqa: E402

COUNT = 12


def same(pixels):
    return pixels


def png(grey):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (grey, grey, grey)).save(file, "PNG")
    return file.getvalue()


def write_tar(path, numbers, broken=()):
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            data = b"broken" if number in broken else png(number)
            entries = {
                "png": data,
                "txt": f"caption {number % 3}".encode(),
                "cls": b"%d" % (number % 3),
            }
            for kind, content in entries.items():
                info = tarfile.TarInfo(f"{number:04d}.{kind}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def tars(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")
    folder = tmp_path / "tars"
    folder.mkdir()
    write_tar(folder / "a.tar", range(COUNT // 2))
    write_tar(folder / "b.tar", range(COUNT // 2, COUNT))
    return folder


CAPTIONS = ["caption 0", "caption 1", "caption 2"]


def numbers(batch):
    return ((batch.x0[:, 0, 0, 0] + 1) * 127.5).round().long().tolist()


def shown(data, steps, size=4, seed=0):
    return [numbers(data.batch(size, seed, step)) for step in steps]


def test_every_epoch_of_a_stream_shows_all_in_an_order_of_its_own(tars):
    data = stream(tars, 8, same, prompts=CAPTIONS, shuffle=5, prompt="txt")
    epochs = [list(chain(*shown(data, range(3 * e, 3 * e + 3)))) for e in range(3)]
    assert all(sorted(epoch) == list(range(COUNT)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert len(data) == COUNT
    assert data.shape == (3, 8, 8)


def test_a_batch_of_a_stream_follows_from_its_number_alone(tars):
    options = {"prompts": CAPTIONS, "shuffle": 5, "flip": True}
    forth = shown(stream(tars, 8, same, **options), range(8))
    data = stream(tars, 8, same, **options)
    assert shown(data, reversed(range(8))) == forth[::-1]
    assert shown(stream(tars, 8, same, **options), [6, 7]) == forth[6:]  # as a resumed run does
    assert shown(data, range(8), seed=1) != forth


def test_passing_rows_to_resume_decodes_none_of_them(tars, monkeypatch):
    read = []
    decode = streaming.decode_picture
    monkeypatch.setattr(streaming, "decode_picture", lambda *args: read.append(1) or decode(*args))
    stream(tars, 8, same, prompts=CAPTIONS).batch(4, 0, 5)
    assert len(read) == 4


@pytest.mark.parametrize("column", ["txt", "cls"])
def test_prompts_given_beforehand_are_numbered(tars, column):
    data = stream(tars, 8, same, prompts=CAPTIONS, prompt=column)
    assert data.prompts == tuple(CAPTIONS)
    batch = data.batch(6, 0, 0)
    assert batch.index.tolist() == [number % 3 for number in numbers(batch)]
    assert batch.condition is None
    assert batch.control is None


def test_captions_nobody_listed_are_encoded_on_the_way(tars):
    def encode_text(texts):
        return {"context": torch.tensor([[float(text[-1])] for text in texts])}

    data = stream(tars, 8, same, encode_text=encode_text, name="mine")
    batch = data.batch(6, 0, 0)
    assert data.prompts == ("mine",)
    assert batch.index.tolist() == [0] * 6
    assert batch.condition["context"].flatten().tolist() == [n % 3 for n in numbers(batch)]
    with pytest.raises(DiffScalerError, match="give the list of prompts, or a text encoder"):
        stream(tars, 8, same)


def test_the_first_rows_are_kept_back_for_validation_and_held(tars):
    encoded = []

    def encode(pixels):
        encoded.append(len(pixels))
        return pixels

    data = stream(tars, 8, encode, prompts=CAPTIONS, validation=5, shuffle=4)
    train, validation = data.split(0.1)
    assert train.prompts == validation.prompts == data.prompts
    assert len(validation) == 5
    assert [numbers(batch) for batch in validation.whole(2)] == [[0, 1], [2, 3], [4]]
    assert [numbers(batch) for batch in validation.whole(2)] == [[0, 1], [2, 3], [4]]
    assert encoded == [2, 2, 1]
    seen = {number for batch in shown(train, range(7), size=2) for number in batch}
    assert seen == set(range(5, COUNT))
    train, validation = data.split(0)
    assert len(validation) == 0
    assert list(validation.whole(2)) == []
    assert {n for batch in shown(train, range(3)) for n in batch} == set(range(COUNT))


def test_the_command_line_trains_on_a_stream(tars, tmp_path, monkeypatch):
    typer_testing = pytest.importorskip("typer.testing")
    from diffscaler_core import load_task, save_task
    from diffscaler_core.commands import app

    from .bases import sd3_pipe, words_of

    words = words_of()
    named = ["", *CAPTIONS]
    file = save_task(words.with_info(prompts=named), tmp_path / "words.safetensors")
    monkeypatch.setattr("diffscaler_core.training.command.train.load_base", lambda *a: sd3_pipe())

    def run(*more):
        told = ["train", "--base", "b", "--data", tars, "--out", tmp_path / "t.safetensors"]
        told += ["--words", file, "--size", 16, "--steps", 3, "--batch", 4, "--stream", *more]
        return typer_testing.CliRunner().invoke(app, [str(word) for word in told])

    plan = run("--plan")
    assert plan.exit_code == 0, plan.output
    assert "a stream of unknown length" in plan.output
    done = run("--sample-steps", 1)
    assert done.exit_code == 0, done.output
    facts = load_task(tmp_path / "t.safetensors").info["training"]
    assert facts["steps_done"] == 3
    refused = run("--buckets")
    assert refused.exit_code == 1
    assert "leave out buckets, or stream" in refused.output


def test_a_bad_row_is_named_once_and_replaced(tars, caplog):
    write_tar(tars / "b.tar", range(COUNT // 2, COUNT), broken=(7, 8))
    data = stream(tars, 8, same, prompts=CAPTIONS, shuffle=0)
    assert shown(data, range(3)) == [[0, 1, 2, 3], [4, 5, 6, 4], [9, 9, 10, 11]]
    assert len(caplog.records) == 1
    assert data.skipped[0].startswith("0007 (cannot be read")
    assert len(data.skipped) == 2


def test_a_batch_of_bad_rows_and_a_vae_that_overflows_are_named(tars):
    write_tar(tars / "a.tar", range(6), broken=range(6))
    data = stream(tars, 8, same, prompts=CAPTIONS, shuffle=0)
    with pytest.raises(DiffScalerError, match="no row of a batch of 4 can be used: '0000"):
        data.batch(4, 0, 0)
    data = stream(tars / "b.tar", 8, lambda pixels: pixels / 0, prompts=CAPTIONS)
    with pytest.raises(DiffScalerError, match="VAE gave NaN"):
        data.batch(4, 0, 0)


def test_a_prompt_that_nobody_listed_is_refused(tars):
    data = stream(tars, 8, same, prompts=CAPTIONS[:2], prompt="txt")
    with pytest.raises(DiffScalerError, match="unknown prompt of the stream 'caption 2'"):
        data.batch(COUNT, 0, 0)


def test_class_labels_and_control_columns_of_a_data_set_stream():
    kinds = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
            "control": datasets.Image(),
        }
    )
    rows = {
        "image": [{"bytes": png(i), "path": None} for i in range(6)],
        "label": [0, 1] * 3,
        "control": [{"bytes": png(100 + i), "path": None} for i in range(6)],
    }
    table = datasets.Dataset.from_dict(rows, features=kinds)
    data = stream(table, 8, same, control=True)
    batch = data.batch(6, 3, 0)
    assert data.prompts == ("cat", "dog")
    assert sorted(numbers(batch)) == list(range(6))
    assert batch.index.tolist() == [number % 2 for number in numbers(batch)]
    control = ((batch.control[:, 0, 0, 0] + 1) * 127.5).round().long()
    assert (control - 100).tolist() == numbers(batch)


def test_files_that_are_not_there_or_no_tars_are_refused(tmp_path, tars):
    with pytest.raises(DiffScalerError, match="no tar file"):
        stream([tmp_path / "gone.tar"], 8, same)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DiffScalerError, match="holds no tar file"):
        stream(tmp_path / "empty", 8, same)
    (tars / "a.tar").write_bytes(b"no tar at all")
    with pytest.raises(DiffScalerError, match="tar files from"):
        stream([tars / "a.tar"], 8, same)
