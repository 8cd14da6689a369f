"""The pack's texts in English, Chinese and Japanese: complete, up to date, and kept in meaning."""

import copy
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

LOCALES = Path(__file__).resolve().parents[2] / "locales"
LANGUAGES = ("zh", "ja")
#: What may stand in Latin letters: names, and what the field writes so in both languages.
NAMES = {
    *("DiffScaler", "Affiner", "ComfyUI", "Wan", "kohya", "diffusers", "safetensors", "AdamW"),
    *("LoRA", "LoHa", "LoKr", "OFT", "DoRA", "VAE", "CLIP", "CFG", "EMA", "GPU", "CPU", "Canny"),
    *("bitsandbytes", "prodigyopt", "beta1", "beta2", "v"),
}
OWN_EDGES = {"DIFFSCALER_GUIDANCE", "DIFFSCALER_TASK", "DIFFSCALER_TRAINING"}
OWN_NAMES = {"zh": {*NAMES, "Latent", "Hook"}, "ja": NAMES}
#: English -> the one word for it: Chinese, Japanese.
GLOSSARY = {
    r"tasks?": ("任务", "タスク"),
    r"models?": ("模型", "モデル"),
    r"frozen": ("冻结", "凍結"),
    r"strengths?": ("强度", "強度"),
    r"prompts?": ("提示词", "プロンプト"),
    r"latents?": ("Latent", "潜在画像"),
    r"masks?": ("遮罩", "マスク"),
    r"noise|noisy": ("噪声", "ノイズ"),
    r"subspaces?": ("子空间", "部分空間"),
    r"rank": ("秩", "ランク"),
    r"blocks?": ("块", "ブロック"),
    r"layers?": ("层", "層"),
    r"control": ("控制", "コントロール"),
    r"guidance": ("引导", "ガイダンス"),
    r"sampling": ("采样", "サンプリング"),
    r"sampler": ("采样器", "サンプラー"),
    r"samples": ("样图", "サンプル画像"),
    r"batch": ("批次", "バッチ"),
    r"learning rates?": ("学习率", "学習率"),
    r"optimi[sz]er": ("优化器", "オプティマイザ"),
    r"loss(es)?": ("损失", "損失"),
    r"validations?": ("验证", "検証"),
    r"checkpoints?": ("检查点", "チェックポイント"),
    r"captions?": ("图像描述", "キャプション"),
    r"text encoders?": ("文本编码器", "テキストエンコーダー"),
    r"seed": ("种子", "シード"),
    r"keyframes?": ("关键帧", "キーフレーム"),
    r"embeddings?": ("嵌入", "埋め込み"),
    r"regular expression": ("正则表达式", "正規表現"),
}
#: What users type into a text, or choose in another combo box, stays as it is.
TYPED = {
    *("blocks", "attention", "mlp", "all", "shift", "subspace"),
    *("diffscaler", "lora", "difffit", "chain"),
}
NUMBER = re.compile(r"(?<!\w)\d+(?:\.\d+)?[%k]?(?!\w)", re.ASCII)
QUOTED = re.compile(r"(?<!\w)'([^']+)'(?!\w)")
IDENTIFIER = re.compile(r"\b[a-z]\w*(?:[_./][\w/-]+)+|\b[a-z]+/(?!\w)")
LATIN = re.compile(r"[A-Za-z]\w*", re.ASCII)
CJK = re.compile(r"[\u3040-\u30ff\u4e00-\u9fff]")

Tree = dict[str, Any]


@pytest.fixture(scope="module")
def make_locales(comfy: ModuleType, script: Callable[[str], ModuleType]) -> ModuleType:
    return script("make_locales")


@pytest.fixture(scope="module")
def files(make_locales: ModuleType, pack: ModuleType) -> dict[str, Tree]:
    """What the English files must hold."""
    return make_locales.english(pack.nodes.NODES)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def schemas(pack: ModuleType) -> dict[str, Any]:
    return {node.__name__: node.GET_SCHEMA() for node in pack.nodes.NODES}


def read(language: str, name: str = "nodeDefs") -> Tree:
    return dict(json.loads((LOCALES / language / f"{name}.json").read_text("utf-8")))


def flat(tree: Tree, *path: str) -> Iterator[tuple[tuple[str, ...], str]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, *path, key)
        else:
            yield (*path, key), value


def pairs(language: str) -> Iterator[tuple[tuple[str, ...], str, str]]:
    """Every text of a node: where, English, translated; what is missing is another test's."""
    translated = dict(flat(read(language)))
    for place, text in flat(read("en")):
        if place in translated:
            yield place, text, translated[place]


def options(schemas: dict[str, Any], place: tuple[str, ...]) -> set[str]:
    """What the combo box at a place offers, less what only this machine offers."""
    if place[1] != "inputs":
        return set()
    found = [one for one in schemas[place[0]].inputs if one.id == place[2]]
    offered = (getattr(found[0], "options", None) or ()) if found else ()
    return {one for one in offered if re.fullmatch(r"[a-z0-9_ ]+", one)}


def test_files_are_what_the_nodes_say(make_locales: ModuleType, files: dict[str, Tree]) -> None:
    assert make_locales.problems(files) == []


def test_every_socket_of_every_node_has_a_name_and_a_tooltip(schemas: dict[str, Any]) -> None:
    for language in ("en", *LANGUAGES):
        nodes = read(language)
        assert list(nodes) == list(schemas)
        for name, schema in schemas.items():
            node = nodes[name]
            assert node["display_name"]
            assert node["description"]
            assert {one.id for one in schema.inputs} <= set(node["inputs"])
            assert list(node["outputs"]) == [str(i) for i in range(len(schema.outputs))]
            for socket in (*schema.inputs, *node["outputs"]):
                entry = node["outputs" if isinstance(socket, str) else "inputs"]
                texts = entry[socket if isinstance(socket, str) else socket.id]
                assert texts["name"], (language, name, texts)
                assert texts["tooltip"], (language, name, texts)


def test_slots_that_grow_have_the_tooltip_of_their_input(schemas: dict[str, Any]) -> None:
    growing = [name for name, s in schemas.items() if any(i.id == "tasks" for i in s.inputs)]
    assert growing
    for language in ("en", *LANGUAGES):
        for name in growing:
            inputs = read(language)[name]["inputs"]
            for slot in (0, 1, 31):  # the frontend asks for `tasks.task0` with an underscore
                assert inputs[f"tasks_task{slot}"] == {"tooltip": inputs["tasks"]["tooltip"]}


def test_own_names_are_translated_the_same_everywhere() -> None:
    for language in ("en", *LANGUAGES):
        main = read(language, "main")
        assert set(main) == {"nodeCategories", "dataTypes", "diffscaler"}
        assert set(main["nodeCategories"]) == {"DiffScaler"}
        assert set(main["dataTypes"]) == OWN_EDGES
        assert all(value for _, value in flat(main))
    assert "任务" in read("zh", "main")["dataTypes"]["DIFFSCALER_TASK"]
    assert "タスク" in read("ja", "main")["dataTypes"]["DIFFSCALER_TASK"]


@pytest.mark.parametrize("language", LANGUAGES)
def test_nothing_is_left_in_english(language: str, schemas: dict[str, Any]) -> None:
    left = []
    for place, english, translated in pairs(language):
        socket = read("en")[place[0]].get(place[1])
        context = english if isinstance(socket, str) else " ".join(socket[place[2]].values())
        code = {*QUOTED.findall(context), *IDENTIFIER.findall(context), *options(schemas, place)}
        literals = {word for piece in code for word in LATIN.findall(piece)}
        literals |= TYPED & set(LATIN.findall(context))
        words = set(LATIN.findall(NUMBER.sub("", translated)))
        if stray := words - OWN_NAMES[language] - literals:
            left.append((place, sorted(stray)))
        if not CJK.search(translated):
            assert words <= OWN_NAMES[language], (place, translated)
    assert left == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_each_is_written_in_its_own_script(language: str) -> None:
    encoding = {"zh": "gb2312", "ja": "cp932"}[language]  # no traditional or simplified strays
    for place, english, translated in pairs(language):
        translated.encode(encoding)
        assert language == "ja" or not re.search(r"[\u3040-\u30ff]", translated), place
        assert not re.search(r"[\u3040-\u30ff\u4e00-\u9fff][,;!?.]", translated), place
        assert english.endswith(".") == translated.endswith("。"), place
        assert translated == translated.strip(), place


@pytest.mark.parametrize("language", LANGUAGES)
def test_code_numbers_and_names_are_kept(language: str, schemas: dict[str, Any]) -> None:
    labels: dict[str, set[str]] = {}
    for place, english, translated in pairs(language):
        if place[-1] == "name" and place[1] == "inputs":
            labels.setdefault(english, set()).add(translated)
    lost = []
    for place, english, translated in pairs(language):
        if place[-1] == "name":
            continue
        names = {n for n in NAMES if re.search(rf"(?<!\w){n}(?:s|'s)?(?!\w)", english)}
        code = {*QUOTED.findall(english), *IDENTIFIER.findall(english)}
        chosen = {o for o in options(schemas, place) if re.search(rf"\b{o}\b", english)}
        for piece in {*names, *code, *chosen, *NUMBER.findall(english)}:
            # of an input, it is the label that is seen
            said = labels.get(piece, {piece}) if piece not in chosen else {piece}
            if not any(one in translated for one in said):
                lost.append((place, piece))
    assert lost == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_nodes_are_called_by_their_translated_titles(language: str) -> None:
    english, translated = read("en"), read(language)
    titles = {node["display_name"]: translated[name] for name, node in english.items()}
    assert len({node["display_name"] for node in translated.values()}) == len(titles)
    seen = 0
    for place, text, said in pairs(language):
        for title, node in titles.items():
            if title in text:
                seen += 1
                assert node["display_name"] in said, (place, title)
    assert seen > len(titles)


@pytest.mark.parametrize("language", LANGUAGES)
def test_one_english_text_has_one_translation(language: str) -> None:
    found: dict[str, set[str]] = {}
    for place, english, translated in pairs(language):
        if (place[2:3], place[-1]) != (("clip",), "name"):  # text encoders; the gradient's norm
            found.setdefault(english, set()).add(translated)
    assert {text: said for text, said in found.items() if len(said) > 1} == {}


@pytest.mark.parametrize(("word", "said"), GLOSSARY.items())
def test_a_word_of_the_field_is_always_the_same(word: str, said: tuple[str, str]) -> None:
    pattern, used = re.compile(rf"\b(?:{word})\b", re.IGNORECASE), 0
    for language, own in zip(LANGUAGES, said, strict=True):
        for place, english, translated in pairs(language):
            plain = QUOTED.sub("", IDENTIFIER.sub("", english))
            if place[-1] == "name" or not (match := pattern.search(plain)):
                continue
            used += 1
            typed = match[0] in TYPED and match[0] in translated
            assert own in translated or typed, (place, english, translated)
    assert used


def test_changed_english_is_noticed(make_locales: ModuleType, files: dict[str, Tree]) -> None:
    changed = copy.deepcopy(files)
    changed["nodeDefs.json"]["DiffScalerLoadTask"]["description"] += " And more."
    assert make_locales.stale(changed) == ["DiffScalerLoadTask"]
    found = make_locales.problems(changed)
    assert any(line.startswith("en/nodeDefs.json is not what the nodes say") for line in found)
    del changed["nodeDefs.json"]["DiffScalerLoadTask"]["outputs"]["0"]["tooltip"]
    changed["nodeDefs.json"]["DiffScalerApplyTask"]["inputs"]["new"] = {"name": "new"}
    found = make_locales.problems(changed)
    for language in LANGUAGES:
        assert f"{language}/nodeDefs.json lacks DiffScalerApplyTask.inputs.new.name" in found
        gone = "DiffScalerLoadTask.outputs.0.tooltip"
        assert f"{language}/nodeDefs.json has {gone}, which no node has" in found


def test_a_real_server_serves_all_three(server: Any) -> None:
    served = server.get("/api/i18n")
    for language in ("en", *LANGUAGES):
        assert served[language]["nodeDefs"] == read(language)
        for key, texts in read(language, "main").items():
            assert served[language][key] == texts
    known = server.get("/object_info")
    ours = {name for name in known if name.startswith("DiffScaler")}
    assert ours == set(served["zh"]["nodeDefs"]) == set(served["ja"]["nodeDefs"])
