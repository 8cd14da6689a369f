import sys

import pytest

from diffscaler_core import DiffScalerError
from diffscaler_core.file_names import harmless
from diffscaler_core.training.config import TrainingConfig
from diffscaler_core.training.config_file import dump, read_config
from diffscaler_core.training.settings import SECTIONS, SETTINGS, TASK_KEYS

GIVEN = 'base = "b"\ndata = "pictures/flowers"\n'


@pytest.fixture
def written(tmp_path):
    def write(text):
        path = tmp_path / "run.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def refused(path, overrides=None):
    with pytest.raises(DiffScalerError) as caught:
        read_config(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_sections_and_flat_keys_mean_the_same(written):
    flat = read_config(written(GIVEN + "rank = 4\nlr = 0.01\nflip = true\nkeep = 5\n"))
    text = GIVEN + "[task]\nrank = 4\n[training]\nlr = 0.01\n[pictures]\nflip = true\n[run]\nkeep=5"
    parted = read_config(written(text))
    assert flat == parted
    assert (parted.config.rank, parted.config.lr, parted.config.keep) == (4, 0.01, 5)
    assert parted.flip is True


def test_flags_win_and_none_is_not_said(written):
    path = written(GIVEN + "lr = 0.01\nsteps = 7\n")
    read = read_config(path, {"lr": 0.5, "steps": None, "out": "x/y.safetensors"})
    assert (read.config.lr, read.config.steps) == (0.5, 7)
    assert read.tasks[0].name == "y"


def test_names_and_places_follow_from_what_is_said(written, tmp_path):
    only = read_config(None, {"base": "b", "data": "pictures/flowers"})
    assert only.config.name == "flowers"
    assert str(only.tasks[0].out) == "runs/flowers/flowers.safetensors"
    out = read_config(None, {"base": "b", "data": "p", "out": "t/roses.safetensors"})
    assert (out.config.name, str(out.folder)) == ("roses", "t/roses")
    data_set = read_config(None, {"base": "b", "data": "datasets:someone/flowers"})
    assert data_set.config.name == "flowers"
    assert data_set.tasks[0].data == "datasets:someone/flowers"


def test_a_run_never_writes_among_its_pictures(tmp_path, monkeypatch):
    """Its samples would be trained on the next time."""
    monkeypatch.chdir(tmp_path)
    read = read_config(None, {"base": "b", "data": "flowers", "out": "flowers.safetensors"})
    assert str(read.folder) == "flowers-run"
    for folder in ("flowers", "flowers/run", str(tmp_path / "flowers" / "deep" / "er")):
        with pytest.raises(DiffScalerError, match="lies among the pictures"):
            read_config(None, {"base": "b", "data": "flowers", "folder": folder})
    assert "among the pictures" in refused(None, {"base": "b", "data": ".", "out": "x.safetensors"})


def test_long_paths_that_begin_alike_are_not_one(written):
    long = "/".join(["folder"] * 20)
    text = 'base = "b"\n' + "".join(
        f'[[tasks]]\nname = "{n}"\ndata = "{n}"\nout = "{long}/{n}.safetensors"\n' for n in "xy"
    )
    assert len(read_config(written(text)).tasks) == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[training]\nlr = -1\n", "run.toml line 4: lr must be above 0, got -1"),
        ("[training]\n\nlearn_rate = 1\n", "run.toml line 5: unknown key 'learn_rate'"),
        ("stepps = 3\n", "did you mean steps?"),
        ("[trainig]\nlr = 1\n", "run.toml line 3: unknown key 'trainig'; did you mean [training]?"),
        ("[run]\nlr = 1.0\n", "run.toml line 4: lr belongs in [training], not in [run]"),
        ("lr = 1.0\n[training]\nlr = 2.0\n", "run.toml line 5: lr is said twice"),
        ("steps = 1.5\n", "run.toml line 3: steps must be a whole number, got 1.5"),
        ("steps = true\n", "steps must be a whole number, got True"),
        ('lr = "fast"\n', "lr must be a number, got 'fast'"),
        ('flip = "yes"\n', "flip must be true or false, got 'yes'"),
        ("words = 3\n", "words must be a path, as a text, got 3"),
        ("targets = [1]\n", "targets must be a text, or a list of texts, got [1]"),
        ('method = "lorra"\n', "run.toml line 3: unknown method 'lorra'; known: diffscaler"),
        ('dtype = "fp8"\n', "run.toml line 3: unknown dtype 'fp8'; known: float32"),
        ("size = 0\n", "run.toml line 3: size must be at least 1, got 0"),
        ('name = ""\n', "run.toml line 3: name is empty"),
        ("batch = 8\naccumulate = 3\n", "run.toml: accumulate 3 must divide the batch of 8"),
        ("lr = = 1\n", "run.toml line 3: "),
        ("tasks = {a = 1}\n", "run.toml line 3: write each task as [[tasks]]"),
        ('out = "t.ckpt"\n', "run.toml: out 't.ckpt' must end in .safetensors"),
        ("tasks = 3\n", "run.toml line 3: write each task as [[tasks]]"),
    ],
)
def test_a_mistake_is_one_line_that_says_where(written, text, said):
    assert said in refused(written(GIVEN + text))


def test_what_is_missing_is_said(written, tmp_path):
    assert "no base was given" in refused(written('data = "x"\n'))
    assert "line 1: base must be a text, got {'name': 'x'}" in refused(
        written('[base]\nname = "x"\n')
    )
    assert "no pictures were given" in refused(written('base = "x"\n'))
    assert "lr must be above 0" in refused(None, {"base": "b", "data": "d", "lr": -1.0})
    assert "is a folder" in refused(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_config(tmp_path / "no.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    assert "no UTF-8" in refused(tmp_path / "bytes.toml")


def test_several_tasks(written):
    text = (
        'base = "b"\nfolder = "runs/two"\nsteps = 9\n'
        '[[tasks]]\nname = "ink"\ndata = "p/ink"\n'
        '[[tasks]]\ndata = "p/neon"\nprompts = "learned"\nout = "neon.safetensors"\n'
    )
    read = read_config(written(text))
    assert [task.name for task in read.tasks] == ["ink", "neon"]
    assert str(read.tasks[0].out) == "runs/two/ink.safetensors"
    assert read.tasks[1].prompts == "learned"
    assert read.config.steps == 9
    assert "line 11: 'lr' is the same for all tasks" in refused(written(text + "lr = 1.0\n"))
    assert "line 11: name must be a text" in refused(written(text + "name = 3\n"))
    both = text + '[[tasks]]\nname = "INK"\ndata = "x"\n'
    assert "two tasks have the name" in refused(written(both))
    assert "belong into each task" in refused(written('data = "x"\n' + text))
    assert "names no data" in refused(written('base = "b"\n[[tasks]]\nname = "x"\n'))


def test_what_is_written_is_read_back(tmp_path):
    config = TrainingConfig(
        name='a "b" \\ é\n\x7f', lr=1e-5, targets=["x", "y"], exclude="z.*", checkpointing=True
    )
    path = tmp_path / "config.toml"
    path.write_text(dump(config, images=3, versions={"torch": "2"}, nothing=None), encoding="utf-8")
    assert read_config(path, {"base": "b", "data": "d"}).config == config
    assert "[facts]" in path.read_text()


def test_a_whole_run_is_written_and_read_back(written, tmp_path):
    text = GIVEN + 'flip = true\nsize = 64\nwords = "w.safetensors"\ndtype = "bfloat16"\n'
    read = read_config(written(text))
    again = tmp_path / "again.toml"
    again.write_text(dump(read.config, read))
    twice = read_config(again)
    assert (twice.config, twice.tasks, twice.flip, twice.size, twice.dtype) == (
        read.config,
        read.tasks,
        True,
        64,
        "bfloat16",
    )
    two = 'base = "b"\n[[tasks]]\ndata = "p/ink"\n[[tasks]]\ndata = "p/neon"\nname = "n"\n'
    read = read_config(written(two))
    again.write_text(dump(read.config, read))
    assert read_config(again).tasks == read.tasks


def test_every_key_can_be_written_and_is_said_somewhere_sensible():
    assert set(TASK_KEYS) <= set(SETTINGS)
    assert {setting.section for setting in SETTINGS.values()} == set(SECTIONS)
    missing = set(TrainingConfig.__dataclass_fields__) - set(SETTINGS)
    assert not missing, "settings that no file can say"
    assert all(len(setting.help) < 60 for setting in SETTINGS.values())


@pytest.mark.parametrize(
    "name", ["../../x", "..", "/etc/passwd", "a\\b", ".hidden", "", "a\0b", "é" * 300]
)
def test_a_name_is_one_harmless_part_of_a_path(name, tmp_path):
    path = tmp_path / f"{harmless(name)}.safetensors"
    assert path.resolve().parent == tmp_path.resolve()
    assert not path.name.startswith(".")
    path.write_bytes(b"")


def test_without_a_toml_reader_one_line_says_what_to_do(written, monkeypatch):
    monkeypatch.setitem(sys.modules, "tomllib", None)
    monkeypatch.setitem(sys.modules, "tomli", None)
    assert "pip install tomli" in refused(written(GIVEN))
