import json
import sys

import pytest
import torch
from PIL import Image

from diffscaler_core.errors import DiffScalerError
from diffscaler_core.training.data.prepare import encode_folder
from diffscaler_core.training.data.sources import find_examples


def same(pixels):
    return pixels


def flat(grey, size=(16, 16)):
    return Image.new("RGB", size, (grey, grey, grey))


def listing(folder, *lines):
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "metadata.jsonl").write_text(text + "\n", encoding="utf-8")


@pytest.fixture
def two(tmp_path):
    for i, name in enumerate(("a", "b")):
        flat(50 + i).save(tmp_path / f"{name}.png")
        flat(200 + i).save(tmp_path / f"{name}_edge.png")
    return tmp_path


def test_hidden_files_are_left_alone(pictures):
    (pictures / "red" / "._0.png").write_bytes(b"what macOS leaves behind")
    (pictures / ".thumbnails").mkdir()
    flat(1).save(pictures / ".thumbnails" / "a.png")
    assert len(find_examples(pictures)) == 6


def test_a_list_names_pictures_and_prompts(two):
    listing(
        two, {"file_name": "b.png", "text": "a béret"}, "", {"file_name": "a.png", "caption": "cup"}
    )
    for where in (two, str(two / "metadata.jsonl")):
        data = encode_folder(where, 16, same)
        assert data.prompts == ("a béret", "cup")
        assert torch.equal(data.latents[0, :, 0, 0, 0] * 127.5 + 127.5, torch.tensor([51.0, 50.0]))


def test_a_list_may_name_control_pictures(two):
    listing(
        two,
        {"file_name": "a.png", "text": "x", "conditioning_image": "a_edge.png", "edge": "b.png"},
        {"file_name": "b.png", "text": "x", "control": "b_edge.png", "edge": "a.png"},
    )
    grey = [
        encode_folder(two, 16, same, control=key).control[0, :, 0, 0, 0] * 127.5 + 127.5
        for key in (True, "edge")
    ]
    assert [values.round().tolist() for values in grey] == [[200, 201], [51, 50]]
    assert encode_folder(two, 16, same).control is None


def test_bad_lines_are_named_by_their_numbers(two):
    listing(
        two,
        {"file_name": "a.png", "text": "x"},
        "{not json",
        {"file_name": "gone.png", "text": "x"},
        {"file_name": "b.png", "label": 3},
        {"text": "x"},
    )
    with pytest.raises(DiffScalerError) as caught:
        encode_folder(two, 16, same)
    told = str(caught.value)
    assert "4 of 5 pictures cannot be used" in told
    assert "metadata.jsonl line 2 (no JSON" in told
    assert "metadata.jsonl line 3, gone.png (no such file)" in told
    assert "metadata.jsonl line 4, b.png (none of text, caption, prompt" in told
    data = encode_folder(two, 16, same, skip_bad=True)
    assert len(data) == 1
    assert data.skipped[-1] == 'metadata.jsonl line 5 (no "file_name")'


def test_a_list_that_is_empty_or_no_text_is_refused(two):
    listing(two, "")
    with pytest.raises(DiffScalerError, match="is empty"):
        find_examples(two)
    (two / "metadata.jsonl").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(DiffScalerError, match="not UTF-8"):
        find_examples(two)


def test_control_pictures_lie_in_a_folder_beside_by_the_same_names(pictures):
    for path in pictures.rglob("*.png"):
        beside = pictures.with_name("pictures_control") / path.relative_to(pictures)
        beside.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).convert("L").save(beside.with_suffix(".JPG"), "JPEG")
    data = encode_folder(pictures, 16, same, control=True, flip=True)
    assert data.control.shape == data.latents.shape
    assert torch.equal(data.control[1], data.control[0].flip(-1))
    grey = data.latents.mean(2) - data.control.mean(2)
    assert float(grey.abs().mean()) < 0.35
    again = encode_folder(pictures, 16, same, control=pictures.with_name("pictures_control"))
    assert torch.equal(again.control[0], data.control[0])


def test_a_missing_control_picture_is_named(pictures):
    with pytest.raises(DiffScalerError, match="pictures_control' is no folder"):
        find_examples(pictures, control=True)
    beside = pictures.with_name("pictures_control") / "red"
    beside.mkdir(parents=True)
    flat(9).save(beside / "0.png")
    (beside / "1.png").write_bytes(b"broken")
    with pytest.raises(DiffScalerError, match="5 of 6 pictures") as caught:
        encode_folder(pictures, 16, same, control=True)
    assert "no control picture of that name" in str(caught.value)
    data = encode_folder(pictures, 16, same, control=True, skip_bad=True)
    assert len(data) == 1
    assert any("its control picture: cannot be read" in line for line in data.skipped)


def test_without_the_library_its_data_sets_are_refused_by_the_command_to_type(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DiffScalerError, match="pip install datasets"):
        find_examples("datasets:someone/pictures")


@pytest.fixture
def table(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="the library datasets is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")
    features = datasets.Features(
        {
            "picture": datasets.Image(),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
            "note": datasets.Value("string"),
            "control": datasets.Image(),
        }
    )
    rows = {
        "picture": [flat(10 * i) for i in range(4)],
        "label": [0, 1, 1, 0],
        "note": ["n0", "n1", "n0", "n3"],
        "control": [flat(100 + 10 * i) for i in range(4)],
    }
    return datasets.Dataset.from_dict(rows, features=features)


def test_class_labels_of_a_data_set_become_their_names(table):
    data = encode_folder(table, 16, same)
    assert data.prompts == ("cat", "dog")
    assert data.index.tolist() == [0, 1, 1, 0]
    assert (data.latents[0, :, 0, 0, 0] * 127.5 + 127.5).round().tolist() == [0, 10, 20, 30]
    assert data.control is None


def test_columns_of_a_data_set_can_be_named(table):
    data = encode_folder(table, 16, same, prompt="note", image="control", control="picture")
    assert data.prompts == ("n0", "n1", "n3")
    assert (data.control[0, :, 0, 0, 0] * 127.5 + 127.5).round().tolist() == [0, 10, 20, 30]
    assert encode_folder(table, 16, same, control=True).control is not None
    with pytest.raises(DiffScalerError, match="unknown column 'pic'; known: picture, label"):
        encode_folder(table, 16, same, image="pic")
    with pytest.raises(DiffScalerError, match="no column of the data set holds pictures"):
        find_examples(table.select_columns(["note"]))


def test_data_sets_are_loaded_from_disk_with_their_splits(table, tmp_path):
    datasets = sys.modules["datasets"]
    table.save_to_disk(str(tmp_path / "one"))
    both = datasets.DatasetDict(train=table.select([0]), test=table)
    both.save_to_disk(str(tmp_path / "both"))
    (tmp_path / "parquet").mkdir()
    table.to_parquet(str(tmp_path / "parquet" / "train.parquet"))
    counts = {
        where: len(find_examples(f"datasets:{tmp_path / where}", split=split))
        for where, split in (("one", "train"), ("both", "test"), ("parquet", "train"))
    }
    assert counts == {"one": 4, "both": 4, "parquet": 4}
    with pytest.raises(DiffScalerError, match=r"split 'valid'") as caught:
        find_examples(f"datasets:{tmp_path / 'both'}", split="valid")
    assert "\n" not in str(caught.value)


def test_a_broken_picture_of_a_data_set_is_named_by_its_row(table):
    datasets = sys.modules["datasets"]
    rows = {
        "image": [{"bytes": b"junk", "path": None}, {"bytes": None, "path": "/nowhere/x.png"}],
        "text": ["a", "b"],
    }
    kinds = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    broken = datasets.Dataset.from_dict(rows, features=kinds)
    with pytest.raises(DiffScalerError, match=r"2 of 2 .*row 0 \(cannot be read.*row 1 \(is no lo"):
        encode_folder(broken, 16, same)
