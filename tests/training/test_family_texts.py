"""What each pipeline's own text encoders tell its model, and what `encode_text` gives for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

d = pytest.importorskip("diffusers")
t = pytest.importorskip("transformers")

from diffscaler_core.training import as_denoiser  # noqa: E402
from diffscaler_core.training.bases.texts import TEXTS  # noqa: E402

from .test_families import CASES, PICTURE, heard_by  # noqa: E402

WORDS = ["<pad>", "<bos>", "<eos>", "<unk>", "a", "big", "red", "cat", "dog", "!"]
PROMPTS = ["a cat", "a big red dog !"]


def tokenizer(length: int = 77, side: str = "right") -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    found = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    found.pre_tokenizer = pre_tokenizers.Whitespace()
    found.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    fast = t.PreTrainedTokenizerFast(
        tokenizer_object=found, model_max_length=length, padding_side=side, **names
    )
    fast.chat_template = "{{ messages[0]['content'] }} !"
    return fast


def t5(kind: Any = None, width: int = 12) -> Any:
    kind, config = kind or (t.T5EncoderModel, t.T5Config)
    return kind(config(d_model=width, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=32))


def clip(width: int, projected: int | None = None) -> Any:
    config = t.CLIPTextConfig(
        hidden_size=width, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        vocab_size=32, projection_dim=projected or 8, eos_token_id=2, bos_token_id=1,
    )  # fmt: skip
    return (t.CLIPTextModelWithProjection if projected else t.CLIPTextModel)(config)


def decoder(kind: Any, config: Any, **more: Any) -> Any:
    return kind(
        config(
            hidden_size=12, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=6, vocab_size=32, pad_token_id=0, **more,
        )
    )  # fmt: skip


def qwen_vl() -> Any:
    text = {
        "hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 32,
        "rope_scaling": {"mrope_section": [1, 1, 1], "rope_type": "default", "type": "default"},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": 12,
    }  # fmt: skip
    config = t.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return t.Qwen2_5_VLForConditionalGeneration(config)


#: Case -> its text encoders and tokenizers, by the pipeline's own names.
PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "sd": lambda: {"text_encoder": clip(12), "tokenizer": tokenizer()},
    "sdxl": lambda: {
        "text_encoder": clip(6), "text_encoder_2": clip(6, 10),
        "tokenizer": tokenizer(), "tokenizer_2": tokenizer(),
    },
    "sd3": lambda: {
        "text_encoder": clip(4, 4), "text_encoder_2": clip(6, 6), "text_encoder_3": t5(),
        "tokenizer": tokenizer(), "tokenizer_2": tokenizer(), "tokenizer_3": tokenizer(),
    },
    "flux": lambda: {
        "text_encoder": clip(10), "text_encoder_2": t5(),
        "tokenizer": tokenizer(), "tokenizer_2": tokenizer(),
    },
    "chroma": lambda: {"text_encoder": t5(), "tokenizer": tokenizer()},
    "pixart sigma": lambda: {"text_encoder": t5(), "tokenizer": tokenizer()},
    "auraflow": lambda: {
        "text_encoder": t5((t.UMT5EncoderModel, t.UMT5Config)), "tokenizer": tokenizer(),
    },
    "hunyuan_dit": lambda: {
        "text_encoder": t.BertModel(t.BertConfig(
            hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
            vocab_size=32,
        )),
        "text_encoder_2": t5(width=16), "tokenizer": tokenizer(), "tokenizer_2": tokenizer(),
    },
    "sana": lambda: {
        "text_encoder": decoder(t.Gemma2Model, t.Gemma2Config), "tokenizer": tokenizer(),
    },
    "lumina2": lambda: {
        "text_encoder": decoder(t.Gemma2Model, t.Gemma2Config), "tokenizer": tokenizer(),
    },
    "z_image": lambda: {
        "text_encoder": decoder(t.Qwen3Model, t.Qwen3Config), "tokenizer": tokenizer(),
    },
    "cogview4": lambda: {
        "text_encoder": decoder(t.GlmModel, t.GlmConfig), "tokenizer": tokenizer(side="left"),
    },
    "qwen_image": lambda: {"text_encoder": qwen_vl(), "tokenizer": tokenizer()},
}  # fmt: skip

#: How guidance is switched on, where it is not by this.
GUIDED: dict[str, dict[str, Any]] = {
    "flux": {"true_cfg_scale": 2.0, "negative_prompt": ["", ""]},
    "qwen_image": {"true_cfg_scale": 2.0, "negative_prompt": ["", ""]},
}
#: CogView4's padding is seen, and as long as the longest text beside it; ours is always 224.
LONG = "a " * 300
BESIDE: dict[str, dict[str, Any]] = {
    "cogview4": {
        "prompt": [*PROMPTS, LONG], "negative_prompt": ["", "", LONG], "max_sequence_length": 224,
    }
}  # fmt: skip
#: What the model reads: the condition's name -> the argument's.
ARGUMENTS = {
    "context": ("encoder_hidden_states", "cap_feats"),
    "mask": ("encoder_attention_mask", "text_embedding_mask", "encoder_hidden_states_mask"),
    "context_2": ("encoder_hidden_states_t5",),
    "mask_2": ("text_embedding_mask_t5",),
    "pooled": ("pooled_projections",),
}


def pipe_with_texts(name: str) -> Any:
    pipe = CASES[name].pipe()
    torch.manual_seed(7)
    for part, value in PARTS[name]().items():
        value = value.eval() if isinstance(value, torch.nn.Module) else value
        pipe.register_modules(**{part: value})
    pipe.tokenizer_max_length = getattr(pipe, "tokenizer_max_length", 77)
    return pipe


def told_by_the_pipeline(pipe: Any, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the stock pipeline tells its model of two prompts, and of no prompt."""
    heard: list[dict[str, Any]] = []
    handle = heard_by(getattr(pipe, CASES[name].component), heard)
    bins = (
        {"use_resolution_binning": False} if "use_resolution_binning" in CASES[name].inputs else {}
    )
    guided = GUIDED.get(name, {"guidance_scale": 2.0})
    texts = {"prompt": list(PROMPTS), **BESIDE.get(name, {})}
    pipe(**texts, **PICTURE, **bins, **guided, num_inference_steps=1,
         output_type="latent")  # fmt: skip
    handle.remove()
    found: list[dict[str, Any]] = []
    for call in heard:
        own = {k: call[a] for k, names in ARGUMENTS.items() for a in names if a in call}
        if "added_cond_kwargs" in call and "text_embeds" in call["added_cond_kwargs"]:
            own["pooled"] = call["added_cond_kwargs"]["text_embeds"]
        found.append(own)
    if len(found) == 2:
        return found[0], found[1]
    halves = [{k: v[:2] for k, v in found[0].items()}, {k: v[2:] for k, v in found[0].items()}]
    return (halves[0], halves[1]) if name == "z_image" else (halves[1], halves[0])


def same_rows(ours: dict[str, Tensor], theirs: dict[str, Any]) -> None:
    """Equal wherever somebody looks: padding that is masked may be of another length."""
    for key in [key for key in ("context", "context_2") if key in theirs]:
        mask = ours.get(key.replace("context", "mask"))
        for i, row in enumerate(theirs[key][:2]):
            length = len(row) if mask is None else int(mask[i].sum())
            seen = min(length, len(row))
            torch.testing.assert_close(
                ours[key][i, :seen], row[:seen].float(), rtol=1e-4, atol=1e-5
            )
            assert len(row) >= length
    if "pooled" in theirs:
        torch.testing.assert_close(ours["pooled"], theirs["pooled"], rtol=1e-4, atol=1e-5)
    for key in [key for key in ("mask", "mask_2") if key in theirs]:
        assert torch.equal(ours[key].sum(1), theirs[key].long().sum(1))


def test_every_family_with_texts_is_compared_here():
    names = {name.split(" ")[0] for name in PARTS}
    assert (names - {"sd"}) | {"unet2d_condition"} == set(TEXTS)


@pytest.mark.parametrize("name", PARTS)
@torch.no_grad()
def test_texts_are_told_as_the_pipeline_tells_them(name):
    pipe = pipe_with_texts(name)
    prompts, null = told_by_the_pipeline(pipe, name)
    denoiser = as_denoiser(pipe)
    assert denoiser.encode_text is not None
    ours = denoiser.encode_text(["", *PROMPTS])
    assert set(ours) <= set(denoiser.fields)
    same_rows({key: rows[1:] for key, rows in ours.items()}, prompts)
    same_rows({key: rows[[0, 0]] for key, rows in ours.items()}, null)
    assert not torch.equal(ours["context"][1], ours["context"][2])


def test_text_encoders_are_told_apart_by_their_weights():
    pipe = pipe_with_texts("sdxl")
    key = as_denoiser(pipe).text_key
    assert key is not None
    assert as_denoiser(pipe_with_texts("sdxl")).text_key == key
    with torch.no_grad():
        next(pipe.text_encoder_2.parameters())[0] += 1
    assert as_denoiser(pipe).text_key != key
