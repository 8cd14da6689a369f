import dataclasses
import math

import pytest
import torch

from diffscaler_core.errors import DiffScalerError, UnknownNameError
from diffscaler_core.training import conditioning, prompts_for
from diffscaler_core.training.conditioning import (
    Prompts,
    encoded_prompts,
    label_prompts,
    learned_prompts,
    perturbation,
    stored_prompts,
)


def test_stored_prompts_are_the_words_and_dropping_gives_the_null(words):
    prompts = stored_prompts(words, ["blue", "red"])
    condition = prompts(torch.tensor([1, 0, 0]), torch.tensor([False, False, True]))
    assert torch.equal(condition["context"][0], words.conditioning["context"][1])
    assert torch.equal(condition["pooled"][1], words.conditioning["pooled"][2])
    assert torch.equal(condition["context"][2], words.conditioning["context"][0])
    assert not any(p.requires_grad for p in prompts.parameters())


def test_unknown_words_are_named_with_a_way_out(words):
    with pytest.raises(DiffScalerError, match=r"1 of 2 prompts are not among .*'pink'.*learn"):
        stored_prompts(words, ["red", "pink"])


def test_learned_prompts_start_near_the_mean_and_apart(words):
    prompts = learned_prompts(words, ["pink", "grey", "red"], noise=0.1)
    mean = words.conditioning["context"][1:].mean(0)
    assert not torch.equal(prompts.context[0], prompts.context[1])
    assert float((prompts.context[:2].detach() - mean).std()) < 0.2
    assert float((prompts.context[2].detach() - words.conditioning["context"][1]).std()) < 0.2
    assert {name for name, _ in prompts.named_parameters()} == {"context", "pooled"}
    assert all(p.requires_grad for p in prompts.parameters())


def test_auto_takes_known_words_and_learns_new_ones(sd3, words):
    assert not prompts_for(sd3, ["red"], words=words).learned
    assert prompts_for(sd3, ["pink", "grey"], words=words).learned
    with pytest.raises(DiffScalerError, match="'pink'"):
        prompts_for(sd3, ["red", "pink"], words=words)


def test_no_words_and_no_text_encoder_is_refused(sd3):
    with pytest.raises(DiffScalerError, match="null prompt"):
        prompts_for(sd3, ["pink"])
    with pytest.raises(DiffScalerError, match="'encoded' cannot be had"):
        prompts_for(sd3, ["pink"], "encoded")


def test_words_without_a_null_prompt_are_refused(words):
    rest = {name: tensor[1:] for name, tensor in words.conditioning.items()}
    bare = words.replace(conditioning=rest).with_info(prompts=["red", "blue", "green"])
    with pytest.raises(DiffScalerError, match="null prompt"):
        stored_prompts(bare, ["red"])


def test_a_text_encoder_is_asked_once_for_each_text(sd3):
    asked = []

    def encode_text(texts):
        asked.extend(texts)
        rows = torch.arange(len(asked) - len(texts), len(asked)).float()
        return {"context": rows.view(-1, 1, 1).expand(-1, 3, 12), "pooled": rows.view(-1, 1)}

    base = dataclasses.replace(sd3, encode_text=encode_text)
    names = [f"a cat {i}" for i in range(10)]
    prompts = prompts_for(base, names)
    assert asked == ["", *names]
    assert prompts.pooled.flatten().tolist() == list(range(1, 11))
    assert float(prompts.null_pooled) == 0


def test_class_labels_number_themselves(denoiser):
    if "label" not in denoiser.fields:
        pytest.skip("no class labels here")
    assert label_prompts(denoiser, ["cat", "1", "dog"]).label.tolist() == [11, 1, 12]
    assert label_prompts(denoiser, ["anything"]).label.tolist() == [10]
    assert label_prompts(denoiser, ["anything"], alone=False).label.tolist() == [11]
    assert label_prompts(denoiser, ["anything"]).null_label.tolist() == [10]
    with pytest.raises(DiffScalerError, match="classes 0 to 9"):
        label_prompts(denoiser, ["12", "3"])


def some_prompts(count=3, tokens=4, width=64, dtype=torch.float32, **more):
    generator = torch.Generator().manual_seed(0)
    fields = {
        "context": torch.randn(count, tokens, width, generator=generator).to(dtype),
        "pooled": torch.randn(count, 32, generator=generator).to(dtype),
        "mask": torch.ones(count, tokens, dtype=torch.long),
    }
    null = {name: torch.zeros_like(tensor[:1]) for name, tensor in fields.items()}
    return Prompts([f"p{i}" for i in range(count)], fields, null, **more)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("kind", "expected"), [("uniform", 1 / math.sqrt(3)), ("gaussian", 1.0)])
@pytest.mark.parametrize("gamma", [0.5, 1.0])
def test_perturbations_have_the_papers_size(kind, expected, gamma):
    width = 256
    noise = perturbation((200, 10, width), kind, gamma, seeded())
    size = gamma / math.sqrt(width)
    assert abs(float(noise.std()) / (expected * size) - 1) < 0.03
    assert abs(float(noise.mean())) < 0.01 * size
    length = float(noise.norm(dim=-1).mean())  # of one vector's noise
    assert abs(length / (expected * gamma) - 1) < 0.03
    assert (float(noise.abs().max()) <= size) == (kind == "uniform")


def test_what_reaches_the_base_is_perturbed_but_never_its_null_prompt():
    prompts = some_prompts()
    index, dropped = torch.tensor([0, 1, 2, 1]), torch.tensor([False, False, True, False])
    noise = prompts.draw_noise(4, "gaussian", 1.0, seeded())
    assert {name: tuple(t.shape) for name, t in noise.items()} == {
        "context": (4, 4, 64), "pooled": (4, 32),
    }  # fmt: skip
    clean, noisy = prompts(index, dropped), prompts(index, dropped, noise)
    for name in ("context", "pooled"):
        difference = noisy[name] - clean[name]
        torch.testing.assert_close(difference[:2], noise[name][:2], rtol=0, atol=1e-6)
        assert not bool(difference[2].any())
        assert bool(difference[3].any())
    assert torch.equal(noisy["mask"], clean["mask"])
    assert not any(bool(t.any()) for t in prompts.null(2).values())


def test_noise_is_new_each_time_and_the_same_for_the_same_seed():
    prompts, generator = some_prompts(), seeded(1)
    first, second = (prompts.draw_noise(2, "uniform", 1.0, generator) for _ in range(2))
    again = prompts.draw_noise(2, "uniform", 1.0, seeded(1))
    assert torch.equal(first["context"], again["context"])
    assert not torch.equal(first["context"], second["context"])
    assert not torch.equal(first["context"][0], first["context"][1])


def test_a_share_of_the_batchs_noise_is_that_of_the_whole_batch():
    prompts, index = some_prompts(), torch.tensor([0, 1, 2, 0])
    noise = prompts.draw_noise(4, "gaussian", 1.0, seeded())
    whole = prompts(index, None, noise)["context"]
    half = prompts(index[2:], None, {name: tensor[2:] for name, tensor in noise.items()})["context"]
    assert torch.equal(whole[2:], half)


@pytest.mark.parametrize(("kind", "gamma"), [("off", 1.0), ("uniform", 0.0), ("gaussian", 0.0)])
def test_no_perturbation_draws_nothing_and_changes_no_bit(kind, gamma):
    prompts, generator = some_prompts(), seeded()
    state = generator.get_state()
    noise = prompts.draw_noise(3, kind, gamma, generator)
    assert noise == {}
    assert torch.equal(generator.get_state(), state)
    index = torch.tensor([0, 1, 2])
    assert torch.equal(prompts(index, None, noise)["context"], prompts.context)


def test_what_has_no_embedding_cannot_be_perturbed():
    labels = Prompts(["cat"], {"label": torch.tensor([1])}, {"label": torch.tensor([9])})
    with pytest.raises(DiffScalerError, match="told label: set perturb to 'off'"):
        labels.draw_noise(2, "uniform", 1.0)
    with pytest.raises(DiffScalerError, match="told nothing"):
        Prompts(["cat"], {}, {}).draw_noise(2, "gaussian", 1.0)
    assert labels.draw_noise(2, "off", 1.0) == {}
    with pytest.raises(UnknownNameError, match="unknown perturbation 'salt'; known: off"):
        labels.draw_noise(2, "salt", 1.0)


def test_many_captions_stay_where_they_are_and_rows_travel(monkeypatch):
    monkeypatch.setattr(conditioning, "LARGE", 1000)
    prompts = some_prompts(dtype=torch.bfloat16)
    table = prompts.context
    assert prompts.place("meta") is prompts
    assert prompts.context is table
    assert prompts.null_context.device.type == "meta"
    condition = prompts(torch.tensor([0, 1]), torch.tensor([True, False]))
    assert {tensor.device.type for tensor in condition.values()} == {"meta"}
    assert condition["context"].dtype == torch.float32
    assert condition["mask"].dtype == torch.long
    few = some_prompts(count=1)
    monkeypatch.setattr(conditioning, "LARGE", 10_000)
    assert few.place("meta").context.device.type == "meta"


def test_learned_prompts_move_and_stay_leaves(words):
    prompts = learned_prompts(words, ["pink"])
    held = prompts.context
    prompts.place("cpu")
    assert prompts.context is held
    assert held.is_leaf
    prompts(torch.tensor([0]))["context"].sum().backward()
    assert prompts.context.grad is not None


def test_frozen_prompts_keep_their_dtype_and_are_not_copied():
    fields = {"context": torch.randn(2, 3, 4).bfloat16()}
    prompts = Prompts(["a", "b"], fields, {"context": torch.zeros(1, 3, 4)})
    assert prompts.context.data_ptr() == fields["context"].data_ptr()
    assert prompts(torch.tensor([1]))["context"].dtype == torch.float32
    assert not list(prompts.parameters())


def test_a_null_prompt_of_another_encoder_is_refused():
    with pytest.raises(DiffScalerError, match=r"null prompt's context is \(5, 4\), .* \(3, 4\)"):
        Prompts(["a"], {"context": torch.zeros(1, 3, 4)}, {"context": torch.zeros(1, 5, 4)})


def longer(texts):
    """An encoder that pads a batch to its longest text."""
    length = max(len(text) for text in texts) + 1
    context = torch.zeros(len(texts), length, 2)
    mask = torch.zeros(len(texts), length, dtype=torch.long)
    for i, text in enumerate(texts):
        context[i, : len(text) + 1] = len(text)
        mask[i, : len(text) + 1] = 1
    return {"context": context, "mask": mask}


def test_texts_of_several_lengths_are_padded_to_the_longest(sd3):
    base = dataclasses.replace(sd3, encode_text=longer, fields=("context", "mask"))
    names = ["a", "bb", "ccc", "dddd"]
    prompts = encoded_prompts(base, names, batch=2)
    assert prompts.context.shape == (4, 5, 2)
    assert prompts.mask.sum(1).tolist() == [2, 3, 4, 5]
    assert prompts.null_mask.tolist() == [[1, 0, 0, 0, 0]]
    assert torch.equal(prompts.context[..., 0].amax(1), torch.tensor([1.0, 2.0, 3.0, 4.0]))


def test_encoded_texts_are_found_again_on_disk(sd3, tmp_path):
    asked = []

    def encode_text(texts):
        asked.extend(texts)
        return longer(texts)

    base = dataclasses.replace(
        sd3, encode_text=encode_text, fields=("context", "mask"), text_key="tiny"
    )
    first = encoded_prompts(base, ["a", "bb"], tmp_path)
    assert asked == ["", "a", "bb"]
    second = prompts_for(base, ["bb", "ccc"], cache=tmp_path)
    assert asked == ["", "a", "bb", "ccc"]
    assert torch.equal(second.context[0, :3], first.context[1])
    nameless = dataclasses.replace(base, text_key=None)
    encoded_prompts(nameless, ["a"], tmp_path)
    assert asked[4:] == ["", "a"]


def test_a_new_prompt_is_trained_with_all_its_tokens_seen(sd3):
    base = dataclasses.replace(sd3, encode_text=longer, fields=("context", "mask"))
    prompts = prompts_for(base, ["a", "b"], "learned")
    assert prompts.learned
    assert bool(prompts.mask.all())
    assert set(prompts.stored()) == {"context"}


def test_a_prompt_that_files_cannot_hold_is_not_learned(sd3):
    def encode_text(texts):
        return {**longer(texts), "context_2": torch.zeros(len(texts), 3, 2)}

    base = dataclasses.replace(sd3, encode_text=encode_text)
    with pytest.raises(DiffScalerError, match="'context_2' besides context and pooled"):
        prompts_for(base, ["a"], "learned")
