import pytest
import torch

from diffscaler_core.errors import DiffScalerError
from diffscaler_core.training import prompts_for
from diffscaler_core.training.conditioning import label_prompts, learned_prompts, stored_prompts


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

    import dataclasses

    base = dataclasses.replace(sd3, encode_text=encode_text)
    names = [f"a cat {i}" for i in range(10)]
    prompts = prompts_for(base, names)
    assert asked == ["", *names]
    assert prompts.pooled.flatten().tolist() == list(range(1, 11))
    assert float(prompts.null_pooled) == 0


def test_class_labels_number_themselves(denoiser):
    if "label" not in denoiser.fields:
        pytest.skip("no class labels here")
    assert label_prompts(denoiser, ["cat", "1", "dog"]).label.tolist() == [0, 1, 2]
    assert label_prompts(denoiser, ["anything"]).label.tolist() == [10]
    assert label_prompts(denoiser, ["anything"]).null_label.tolist() == [10]
    with pytest.raises(DiffScalerError, match="classes 0 to 9"):
        label_prompts(denoiser, ["12", "3"])
