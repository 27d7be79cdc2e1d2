"""train_clip.py from the outside: its loss, exact resume, what it saves, and that it learns."""

import copy
import json
import math

import pytest
import torch
from safetensors import safe_open

import train_clip
from conftest import rows, same, state
from nanodiff.errors import UserError
from nanodiff.formats.stable_diffusion_folder import load_text_encoder, save_text_encoder
from nanodiff.models.clip_text import ClipText, ClipTextConfig, Tokenizer

SENTENCES = ["a star", "a photo of a very small red star on a wide blue ground, seen from above", "", "two rings"]


def words(out, **changes):
    """Flags of a training that takes a second."""
    flags = {"out": out, "pictures": 24, "variants": 2, "width": 32, "layers": 1, "heads": 2, "steps": 4, "batch": 8,
             "warmup": 1, "workers": 0, "log_every": 1, "preview_every": 2, "checkpoint_every": 2, "device": "cpu",
             **changes}
    return [f"--{name}={value}" for name, value in flags.items()]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "straight"
    train_clip.main(words(out))
    return out


@pytest.fixture(scope="module")
def clip():
    generator = torch.Generator().manual_seed(0)
    sizes = ClipTextConfig(width=32, layers=2, heads=2, mlp=64)
    return train_clip.Clip(ClipText(sizes, generator), 128, generator).eval()


# --- the loss -------------------------------------------------------------------------------------------------------

def test_info_nce_is_log_b_at_chance_and_0_where_every_pair_is_found():
    for b in (2, 8, 192):
        assert float(train_clip.info_nce(torch.full((b, b), 3.0))) == pytest.approx(math.log(b), rel=1e-6)
        assert float(train_clip.info_nce(100 * torch.eye(b))) == pytest.approx(0, abs=1e-6)


def test_info_nce_counts_both_directions_alike():
    logits = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    rows, columns = (logits.softmax(dim).diagonal().log().neg().mean() for dim in (1, 0))
    assert torch.allclose(train_clip.info_nce(logits), (rows + columns) / 2)
    assert torch.allclose(train_clip.info_nce(logits), train_clip.info_nce(logits.T))
    order = torch.tensor([3, 0, 4, 1, 2])
    assert torch.allclose(train_clip.info_nce(logits[order][:, order]), train_clip.info_nce(logits))
    assert abs(float(rows - columns)) > 0.01  # or the test says nothing


def test_logits_are_cosines_times_the_temperature_which_starts_at_one_over_0_07_and_ends_at_100(clip):
    ids = Tokenizer.shipped()(SENTENCES)
    features = torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = clip(ids, features)
        assert float(logits.abs().max()) <= 1 / 0.07 + 1e-4
        assert torch.allclose(clip(ids, 7 * features), logits, atol=1e-5)  # a cosine knows no length
        clip.scale.add_(10)
        steep = clip(ids, features)
        clip.scale.sub_(10)
    assert torch.allclose(steep, logits * 7, rtol=1e-4)


def test_leaving_out_what_stands_behind_the_last_end_token_changes_nothing(clip):
    ids = Tokenizer.shipped()(SENTENCES)
    longest = int((ids == 49407).int().argmax(1).max()) + 1
    assert longest < 25
    text = copy.deepcopy(clip.text).double()  # sums of other lengths are rounded otherwise
    with torch.no_grad():
        whole = text(ids)[1]
        assert torch.allclose(text(ids[:, :longest])[1], whole, rtol=0, atol=1e-12)
        assert not torch.allclose(text(ids[:, :longest - 1])[1], whole, atol=1e-3)  # without the last end token


# --- training -------------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_a_tiny_set_is_learned_well_below_chance(tmp_path):
    train_clip.main(words(tmp_path / "run", steps=30, batch=12, variants=1, lr=3e-3, preview_every=100, log_every=10))
    losses = [row["loss"] for row in rows(tmp_path / "run") if "loss" in row]
    assert losses[-1] < 0.6 * math.log(12)


def test_the_saved_folder_opens_again_with_the_averaged_weights(straight):
    net, tokenizer = load_text_encoder(straight / "model")
    averaged = {key.removeprefix("text."): tensor for key, tensor in state(straight)["ema"]["net"].items()
                if key.startswith("text.")}
    assert same(dict(net.state_dict()), averaged) and not same(averaged, {
        key.removeprefix("text."): tensor for key, tensor in state(straight)["net"].items() if key.startswith("text.")})
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    assert torch.equal(tokenizer(SENTENCES), Tokenizer.shipped()(SENTENCES))
    assert net(tokenizer(SENTENCES))[0].shape == (4, 77, 32)


def test_the_saved_folder_has_the_names_of_a_transformers_clip_text_model(straight):
    settings = json.loads((straight / "model/text_encoder/config.json").read_text())
    assert settings["architectures"] == ["CLIPTextModel"] and settings["model_type"] == "clip_text_model"
    assert (settings["hidden_size"], settings["num_hidden_layers"], settings["num_attention_heads"]) == (32, 1, 2)
    assert (settings["intermediate_size"], settings["vocab_size"], settings["eos_token_id"]) == (128, 49408, 49407)
    with safe_open(straight / "model/text_encoder/model.safetensors", "pt") as file:
        names = set(file.keys())
    layer = "text_model.encoder.layers.0."
    assert names == {
        "text_model.embeddings.token_embedding.weight", "text_model.embeddings.position_embedding.weight",
        *(f"{layer}self_attn.{part}_proj.{kind}" for part in ("q", "k", "v", "out") for kind in ("weight", "bias")),
        *(f"{layer}{part}.{kind}" for part in ("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2")
          for kind in ("weight", "bias")),
        "text_model.final_layer_norm.weight", "text_model.final_layer_norm.bias"}
    assert {path.name for path in (straight / "model/tokenizer").iterdir()} >= {
        "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"}


# --- wrong input ----------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_a_text_encoder_comes_back_bit_for_bit_and_a_wrong_folder_is_one_sentence(tmp_path):
    net = ClipText(ClipTextConfig(width=8, layers=1, heads=1, mlp=8), torch.Generator().manual_seed(0))
    save_text_encoder(net.half(), Tokenizer.shipped(), tmp_path / "run/model")
    found, _ = load_text_encoder(tmp_path / "run/model")
    assert found.config == net.config and same(dict(found.state_dict()), dict(net.float().state_dict()))
    with pytest.raises(UserError, match="holds no text encoder.*nearest: .*model"):
        load_text_encoder(tmp_path / "run")
    with pytest.raises(UserError, match="holds no text encoder"):
        load_text_encoder(tmp_path / "nothing")
    (tmp_path / "run/model/text_encoder/model.safetensors").unlink()
    with pytest.raises(UserError, match="holds no weights"):
        load_text_encoder(tmp_path / "run/model")


@pytest.mark.parametrize("change, expected", [
    ({"pictures": 5}, "--pictures is 5"), ({"variants": 0}, "--variants is 0"), ({"heads": 5}, "5 heads"),
    ({"batch": 1}, "--batch is 1"), ({"weight_decay": -1}, "--weight_decay is -1"),
    ({"layers": 0}, "--layers is 0")])
def test_wrong_flags_end_with_one_sentence_before_anything_is_drawn_or_written(tmp_path, capsys, change, expected):
    with pytest.raises(SystemExit) as stop:
        train_clip.main(words(tmp_path / "run", **change))
    output = capsys.readouterr()
    assert stop.value.code == 2 and expected in output.err and output.err.strip().count("\n") == 0
    assert not (tmp_path / "run").exists() and "drawing" not in output.out
