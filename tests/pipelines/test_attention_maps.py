"""Attention maps of words: what they add up to, what they are made of, and that they leave no trace."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

import nanodiff
from nanodiff import fast, sample
from nanodiff.errors import UserError
from nanodiff.models.blocks import Attention
from nanodiff.models.cond_unet import CondUNet, CondUNetConfig, TransformerBlock
from nanodiff.pipelines import attention_maps as attention
import tiny_sd

PROMPT = "a photo of Spiralled cloth, a zxqj of cloth"
DRAWN = {"steps": 3, "seed": 5, "progress": False}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for name in tiny_sd.NAMES:
        tiny_sd.write_model(name, root / name)
    tiny_sd.write_embedding("emb_params", root / "knit.safetensors")
    return root


@pytest.fixture(scope="module")
def sd(place):
    sd = nanodiff.load(place / "sd1")
    sd.load_embedding(place / "knit.safetensors")  # <knit> has three vectors
    return sd


def hooks(net):
    """Everything that could stay behind in a network: hooks, and attributes of its modules."""
    return [(name, sorted(vars(module)), *(len(value) for key, value in sorted(vars(module).items()) if "hooks" in key))
            for name, module in net.named_modules()]


# --- what the numbers are -------------------------------------------------------------------------------------------

def by_hand(attention, x, context):
    """[heads, N, M]: softmax(q k^T / sqrt(d)) in float64, head by head and pixel by pixel, from the layer's weights."""
    q, k = x.double() @ attention.to_q.weight.double().T, context.double() @ attention.to_k.weight.double().T
    d = q.shape[1] // attention.heads
    out = []
    for head in range(attention.heads):
        some = slice(head * d, (head + 1) * d)
        out.append(torch.stack([torch.exp(k[:, some] @ pixel / d**0.5) for pixel in q[:, some]]))
        out[-1] /= out[-1].sum(1, keepdim=True)
    return torch.stack(out)


@pytest.mark.slow
@pytest.mark.parametrize("name", tiny_sd.NAMES)
@torch.no_grad()
def test_maps_are_the_mean_of_each_layers_softmax_of_queries_and_keys(name, place):
    sd = nanodiff.load(place / name)
    seen, rng = {}, torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 7, 10, generator=rng)  # odd: levels of 7x10, 4x5, 2x3
    context = sd.encode_text(["", PROMPT])
    layers = [module.attn2 for module in sd.unet.modules() if isinstance(module, TransformerBlock)]
    handles = [layer.register_forward_hook(lambda layer, inputs, _: seen.update({layer: inputs[0][1].clone()}))
               for layer in layers]
    with attention.recorded(sd.unet) as sums:
        sd.unet(x, 500, context)
        fast.once_a_run(sd.unet, [500])(x, 500, context)  # the same once more, as a run of many steps does it
    for handle in handles:
        handle.remove()
    wanted, sizes = {}, {70: (7, 10), 20: (4, 5), 6: (2, 3), 2: (1, 2)}
    for layer in layers:
        p = by_hand(layer, seen[layer], context[1]).mean(0)
        size = sizes[len(p)]
        wanted.setdefault(size, []).append(p.T.unflatten(1, size))
    assert sums.keys() == wanted.keys() and len(wanted) >= 2
    for size, maps in wanted.items():
        assert sums[size][1] == 2 * len(maps)
        assert torch.allclose(sums[size][0].double(), 2 * sum(maps), atol=1e-5)
    resized = [torch.nn.functional.interpolate(one[None], (7, 10), mode="bilinear")[0] for maps in wanted.values()
               for one in maps]
    assert torch.allclose(attention.token_maps(sums, (7, 10)).double(), sum(resized) / len(resized), atol=1e-6)


@torch.no_grad()
def test_a_layers_probabilities_times_its_values_are_its_output():
    layer = Attention(12, 3, 4, 8)
    x, context = torch.randn(2, 6, 12), torch.randn(2, 5, 8)
    p = attention.probabilities(layer, x, context)
    h = p @ layer.keys_and_values(context)[1][1:]
    assert torch.allclose(layer.to_out[0](h.transpose(1, 2).flatten(2)), layer(x, context)[1:], atol=1e-6)


@pytest.mark.parametrize("sampler, calls", [("dpm++2m", 3), ("heun", 5), ("pndm", 4)])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_the_shares_of_all_tokens_add_up_to_one_at_every_pixel(sampler, calls, guidance, sd):
    with attention.recorded(sd.unet) as sums:
        sd.generate(PROMPT, guidance=guidance, sampler=sampler, height=28, width=40, output="latents", **DRAWN)
    shares = attention.token_maps(sums, (7, 10))
    assert shares.shape == (77, 7, 10) and float(shares.min()) >= 0
    assert torch.allclose(shares.sum(0), torch.ones(7, 10), atol=1e-5)
    layers = sum(isinstance(module, TransformerBlock) for module in sd.unet.modules())
    assert sum(count for _, count in sums.values()) == calls * layers


def test_the_half_of_the_prompt_is_recorded_and_not_that_of_the_negative_text(sd):
    drawn = {"sampler": "ddim", **DRAWN, "steps": 1}
    _, alone = attention.attention_maps(sd, PROMPT, ["cloth"], guidance=1.0, **drawn)
    for negative in ("", "blurry " * 20):
        _, guided = attention.attention_maps(sd, PROMPT, ["cloth"], guidance=4.0, negative=negative, **drawn)
        assert torch.allclose(alone["cloth"], guided["cloth"], atol=1e-6)
    _, other = attention.attention_maps(sd, "blurry cloth", ["cloth"], guidance=4.0, negative=PROMPT, **drawn)
    assert not torch.allclose(alone["cloth"], other["cloth"], atol=1e-4)


# --- which tokens are a word's --------------------------------------------------------------------------------------

def test_a_word_is_all_its_tokens_wherever_it_stands(sd):
    prompt = "a microfibre of fibre, <knit> by zxqj and Fibre of<knit>"
    tokens = ["<start>", *sd.tokenizer.split(prompt)]
    places = attention.word_places(sd.tokenizer, prompt, ["FIBRE", "zxqj", "<knit>", "by zxqj", "of"])
    for word, where in places.items():
        one = sd.tokenizer.split(word)
        assert [tokens[i] for i in where] == one * (len(where) // len(one)), word
    assert tokens.count("fibre</w>") == 3 and len(places["FIBRE"]) == 2  # microfibre is another word
    assert len(places["<knit>"]) == 6 and len(places["of"]) == 2
    assert len(places["zxqj"]) > 1 and places["by zxqj"][1:] == places["zxqj"]


def test_a_words_map_is_the_mean_over_its_tokens(sd):
    prompt = "cloth of <knit>, cloth"
    picture, maps = attention.attention_maps(sd, prompt, ["cloth", "<knit>"], **DRAWN)
    with attention.recorded(sd.unet) as sums:
        sd.generate(prompt, output="latents", **DRAWN)
    shares = attention.token_maps(sums, (8, 8))
    assert picture.shape == (3, 32, 32) and list(maps) == ["cloth", "<knit>"]
    assert torch.equal(maps["cloth"], (shares[1] + shares[7]) / 2)
    assert torch.allclose(maps["<knit>"], (shares[3] + shares[4] + shares[5]) / 3, atol=1e-7)


@pytest.mark.parametrize("prompt, words, expected", [
    (PROMPT, ["cloth", "spiraled"], '"spiraled" is not in the prompt; expected one of a, photo, of, spiralled, cloth, '
     "zxqj, nearest: spiralled"),
    (PROMPT, ["clot"], "nearest: cloth"), (PROMPT, ["qj"], '"qj" is not in the prompt'), (PROMPT, [""], '"" is not in'),
    (PROMPT, ["cloth spiralled"], "is not in the prompt"), ("", ["cloth"], "is not in the prompt; expected one of its"),
    (PROMPT, [], "no word was named"), (["a cloth"], ["cloth"], "the prompt is of type list"),
    ("cloth " * 75 + "end", ["end"], '"end" stands behind the 75 tokens of the prompt that fit'),
])
def test_a_word_that_is_not_there_is_told_before_anything_is_drawn(prompt, words, expected, sd, monkeypatch):
    monkeypatch.setattr(CondUNet, "forward", lambda *_: pytest.fail("the U-Net was called"))
    with pytest.raises(UserError) as error:
        attention.attention_maps(sd, prompt, words)
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_a_network_that_hides_its_attention_or_has_none_is_told(place, monkeypatch):
    sd = nanodiff.load(place / "sd1")
    sd.compiled = True
    with pytest.raises(UserError, match="compiled"):
        attention.attention_maps(sd, PROMPT, ["cloth"])
    sd.compiled = False
    sd.unet = CondUNet(CondUNetConfig(channels=(8,), blocks=1, attention=(), mid_attention=False, heads=(1,), groups=4))
    with pytest.raises(UserError, match="no transformers"):
        attention.attention_maps(sd, PROMPT, ["cloth"])


# --- no trace -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", tiny_sd.NAMES)
def test_the_picture_is_the_same_bit_for_bit_and_nothing_is_left_behind(name, place):
    sd = nanodiff.load(place / name)
    before, weights = hooks(sd.unet), {key: value.clone() for key, value in sd.unet.state_dict().items()}
    wanted = sd.generate(PROMPT, output="tensor", first=2, **DRAWN)[0]
    picture, _ = attention.attention_maps(sd, PROMPT, "cloth", first=2, **DRAWN)
    assert torch.equal(picture, wanted) and hooks(sd.unet) == before
    assert all(torch.equal(value, weights[key]) for key, value in sd.unet.state_dict().items())
    with pytest.raises(KeyboardInterrupt), attention.recorded(sd.unet):
        raise KeyboardInterrupt
    assert hooks(sd.unet) == before


def test_loras_are_part_of_what_is_recorded(place, tmp_path):
    sd = nanodiff.load(place / "sd1")
    tiny_sd.write_lora("peft", tmp_path / "peft.safetensors")
    plain = attention.attention_maps(sd, PROMPT, ["cloth"], **DRAWN)[1]["cloth"]
    sd.load_lora(tmp_path / "peft.safetensors")
    beside = attention.attention_maps(sd, PROMPT, ["cloth"], **DRAWN)[1]["cloth"]
    sd.merge_lora()
    merged = attention.attention_maps(sd, PROMPT, ["cloth"], **DRAWN)[1]["cloth"]
    assert torch.allclose(beside, merged, atol=1e-5) and not torch.allclose(plain, beside, atol=1e-4)


# --- the sheet and the command --------------------------------------------------------------------------------------

def test_heat_is_white_where_a_word_acts_most_and_black_where_least():
    picture = torch.full((3, 8, 8), -1.0)
    table = torch.zeros(4, 4)
    table[1, 1], table[2:] = 0.3, 0.1
    shown = attention.over(picture, table)
    assert shown.shape == (3, 8, 8) and float(shown.min()) >= -1 and float(shown.max()) <= 1
    assert torch.equal(shown[:, 0, 7], torch.full((3,), -1.0)) and float(shown[0, 7, 7]) > float(shown[2, 7, 7])
    assert not attention.over(picture, torch.full((4, 4), 0.5)).isnan().any()


def test_the_command_writes_a_sheet_beside_the_same_pictures(place, tmp_path):
    flags = [f"--model={place}/sd1", f"--prompt={PROMPT}", "--n=2", "--steps=3", "--seed=5", "--device=cpu"]
    sample.main([*flags, f"--out={tmp_path}/plain"])
    sample.main([*flags, f"--out={tmp_path}/maps", "--attention=cloth, zxqj"])
    names = ["0005-00000.png", "0005-00001.png", "grid.png"]
    assert set(os.listdir(tmp_path / "maps")) == {*names, "attention.png"}
    for name in names:
        plain, maps = Image.open(tmp_path / "plain" / name), Image.open(tmp_path / "maps" / name)
        assert plain.text == maps.text
        assert abs(np.asarray(plain).astype(int) - np.asarray(maps).astype(int)).max() <= 1
    sheet = np.asarray(Image.open(tmp_path / "maps/attention.png"))
    assert sheet.shape[0] > 2 * 160 and sheet.shape[1] > 3 * 160 and sheet.std() > 10


@pytest.mark.parametrize("flags, expected", [
    (["--attention=woven"], '"woven" is not in the prompt'), (["--attention=,"], '--attention is ","'),
    (["--attention=cloth", "--compile=default"], "--attention and --compile"),
])
def test_the_command_refuses_wrong_words_before_anything_is_written(flags, expected, place, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        sample.main([f"--model={place}/sd1", f"--prompt={PROMPT}", f"--out={tmp_path}/out", "--device=cpu", *flags])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and expected in error and error.count("\n") == 1 and not (tmp_path / "out").exists()
