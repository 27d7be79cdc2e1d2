"""Model folders: strict in, atomic out, the same network after a round trip."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanodiff.diffusion.schedule import Schedule
from nanodiff.errors import UserError
from nanodiff.formats.diffusers_folder import (WEIGHTS, load_schedule, load_unet, plain_names, read_safetensors,
                                               save_schedule, save_unet, unet_config_from, unet_config_to)
from nanodiff.models.unet import UNet, UNetConfig

CONFIGS = {
    "plain": {},
    "heads at two widths": {"attention": (0, 1)},
    "one head": {"heads": 1},
    "head width": {"head_dim": 4},
    "folded pixels": {"patch": 2},
    "classes": {"num_classes": 3},
    "classes without a free one": {"num_classes": 3, "no_class": False},
    "other details": {"up_attention": (0,), "mid_attention": False, "eps": 1e-5, "activation": "gelu",
                      "freq_shift": 0.0, "flip_sin_to_cos": True, "downsample_padding": 1, "center_input": True,
                      "mid_groups": 2,
                      "time_channels": 20, "dropout": 0.1},
}


def lively(seed=0, **changes):
    net = UNet(UNetConfig(**{"channels": (8, 16), "groups": 4, "heads": 4, **changes}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(std=0.2, generator=generator)
    return net.eval()


def picture(channels=3):
    return torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(1))


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_saved_network_loads_as_the_same_network(name, tmp_path):
    net = lively(**CONFIGS[name])
    save_unet(net, tmp_path / "unet")
    loaded = load_unet(tmp_path / "unet")
    assert not loaded.training
    own, other = net.state_dict(), loaded.state_dict()
    assert own.keys() == other.keys() and all(torch.equal(own[k], other[k]) for k in own)
    label = torch.tensor([0, 2]) if net.config.num_classes else None
    assert torch.equal(net(picture(), 5, label), loaded(picture(), 5, label))


@pytest.mark.parametrize("name", CONFIGS)
def test_settings_survive_two_conversions(name):
    settings = unet_config_to(lively(**CONFIGS[name]).config)
    again = unet_config_to(unet_config_from(json.loads(json.dumps(settings))))
    assert again == settings
    assert ("patch" in settings) == (name == "folded pixels") and ("no_class" in settings) == (name == "classes")


def test_saved_files_are_what_diffusers_expects(tmp_path):
    net = lively(num_classes=3)
    save_unet(net, tmp_path / "unet")
    assert sorted(os.listdir(tmp_path)) == ["unet"]  # no temporary folder is left
    assert sorted(os.listdir(tmp_path / "unet")) == ["config.json", WEIGHTS]
    settings = json.loads((tmp_path / "unet" / "config.json").read_text())
    assert settings["_class_name"] == "UNet2DModel" and settings["block_out_channels"] == [8, 16]
    assert settings["down_block_types"] == ["DownBlock2D", "AttnDownBlock2D"]
    assert settings["up_block_types"] == ["AttnUpBlock2D", "UpBlock2D"]
    assert settings["attention_head_dim"] == 4 and settings["num_class_embeds"] == 4
    assert all(t.is_contiguous() for t in load_file(tmp_path / "unet" / WEIGHTS).values())


def test_absent_settings_mean_the_defaults_of_diffusers():
    config = unet_config_from({"_class_name": "UNet2DModel", "block_out_channels": [32, 64, 64, 64]})
    assert (config.eps, config.freq_shift, config.flip_sin_to_cos, config.downsample_padding) == (1e-5, 0, True, 1)
    assert (config.head_dim, config.groups, config.blocks, config.attention) == (8, 32, 2, (1, 2, 3))


@pytest.mark.parametrize("changes, words", [
    ({"_class_name": "UNet2DConditionModel"}, "expected a UNet2DModel"),
    ({"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift 'scale_shift' is not supported"),
    ({"time_embedding_type": "fourier"}, "time_embedding_type 'fourier'"),
    ({"mid_block_scale_factor": 1.4}, "mid_block_scale_factor 1.4"),
    ({"mid_block_type": None}, "mid_block_type None"),
    ({"class_embed_type": "timestep"}, "class_embed_type 'timestep'"),
    ({"downsample_type": "resnet"}, "downsample_type 'resnet'"),
    ({"down_block_types": ["SkipDownBlock2D", "DownBlock2D"]}, 'block type "SkipDownBlock2D"'),
    ({"down_block_types": ["DownBlock2D"]}, "1 block types for 2 levels"),
    ({"norm_eps_": 1e-3}, 'setting "norm_eps_" is unknown, nearest: norm_eps'),
    ({"act_fn": "sillu"}, 'nearest: silu'),
    ({"attention_head_dim": [4, 4]}, "not one number of heads"),
])
def test_settings_that_would_be_another_network_are_refused(changes, words, tmp_path):
    save_unet(lively(), tmp_path / "unet")
    edit_config(tmp_path / "unet", **changes)
    with pytest.raises(UserError, match=words):
        load_unet(tmp_path / "unet")


def test_missing_left_over_and_misshapen_weights_are_refused_by_name(tmp_path):
    net = lively()
    save_unet(net, tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    for change, words in (
        (lambda w: w.pop("conv_in.bias"), 'missing, for example "conv_in.bias"'),
        (lambda w: w.update(extra=torch.zeros(1)), 'left over, for example "extra"'),
        (lambda w: w.update({"conv_in.bias": torch.zeros(3)}), r"has shape \[3\], expected \[8\]"),
        (lambda w: w.update({"_orig_mod.conv_in.bias": torch.zeros(8)}), "twice"),
    ):
        changed = dict(weights)
        change(changed)
        save_file(changed, tmp_path / WEIGHTS)
        with pytest.raises(UserError, match=words):
            load_unet(tmp_path)


def test_weights_are_read_under_older_names_and_from_compiled_networks(tmp_path):
    net = lively(attention=(0, 1))
    save_unet(net, tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    older = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
    old = {}
    for key, tensor in weights.items():
        for new, name in older.items():
            key = key.replace(new, name)
        old["_orig_mod." + key] = tensor
    assert sum("query" in key for key in old) == 2 * sum("to_q.weight" in key for key in weights) > 0
    once = plain_names(old)
    assert once.keys() == weights.keys() and plain_names(once).keys() == once.keys()
    assert len(once) == len(old)  # every source key is used
    save_file(old, tmp_path / WEIGHTS)
    loaded = load_unet(tmp_path)
    assert torch.equal(loaded(picture(), 5), net(picture(), 5))


@pytest.mark.slow
def test_a_compiled_network_saves_plain_names(tmp_path):
    net = lively()
    save_unet(torch.compile(net), tmp_path / "compiled")  # wraps only; nothing is compiled before a call
    assert not any("_orig_mod" in key for key in load_file(tmp_path / "compiled" / WEIGHTS))
    assert torch.equal(load_unet(tmp_path / "compiled")(picture(), 5), net(picture(), 5))


def test_tied_and_sliced_weights_can_be_saved(tmp_path):
    net = lively()
    a, b = net.mid_block.attentions[0].to_q, net.mid_block.attentions[0].to_k
    a.weight = b.weight
    net.conv_out.bias = torch.nn.Parameter(torch.arange(6.0)[::2])
    save_unet(net, tmp_path / "unet")
    assert torch.equal(load_unet(tmp_path / "unet")(picture(), 5), net(picture(), 5))


def test_a_failed_save_leaves_the_old_folder_whole(tmp_path, monkeypatch):
    net = lively()
    save_unet(net, tmp_path / "unet")
    before = {name: (tmp_path / "unet" / name).read_bytes() for name in os.listdir(tmp_path / "unet")}

    def full_disk(tensors, path, metadata):
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nanodiff.formats.weights.save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_unet(lively(seed=1), tmp_path / "unet")
    assert os.listdir(tmp_path) == ["unet"]
    assert before == {name: (tmp_path / "unet" / name).read_bytes() for name in os.listdir(tmp_path / "unet")}


@pytest.mark.parametrize("spoil, words", [
    (lambda folder: (folder / "config.json").unlink(), "cannot be read"),
    (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
    (lambda folder: (folder / "config.json").write_text("[]"), "must hold a JSON object"),
    (lambda folder: (folder / WEIGHTS).unlink(), "cannot be read"),
    (lambda folder: (folder / WEIGHTS).write_bytes(b"\xff" * 100), "not a valid safetensors file"),
    (lambda folder: os.truncate(folder / WEIGHTS, 5000), "not a valid safetensors file"),
])
def test_broken_folders_are_named(spoil, words, tmp_path):
    save_unet(lively(), tmp_path / "unet")
    spoil(tmp_path / "unet")
    with pytest.raises(UserError, match=words):
        load_unet(tmp_path / "unet")


@pytest.mark.parametrize("schedule", [
    Schedule.linear(), Schedule.linear(50, 1e-3, 0.1), Schedule.scaled_linear(), Schedule.cosine(100),
    Schedule.scaled_linear().zero_terminal_snr(), Schedule.linear(20).zero_terminal_snr(),
    Schedule.cosine(30).zero_terminal_snr(), Schedule.from_betas([0.1, 0.3, 0.2]),
])
@pytest.mark.parametrize("kind", ["noise", "x0", "v"])
def test_schedules_survive_a_round_trip(schedule, kind, tmp_path):
    save_schedule(schedule, kind, tmp_path / "model")
    loaded, loaded_kind = load_schedule(tmp_path / "model")
    assert loaded_kind == kind
    torch.testing.assert_close(loaded.alpha_bar, schedule.alpha_bar, rtol=1e-12, atol=0)
    assert loaded.T == schedule.T and float(loaded.alpha_bar[-1] == 0) == float(schedule.alpha_bar[-1] == 0)


def test_usual_schedules_are_saved_by_name(tmp_path):
    save_schedule(Schedule.scaled_linear().zero_terminal_snr(), "v", tmp_path)
    settings = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert settings["beta_schedule"] == "scaled_linear" and settings["rescale_betas_zero_snr"] is True
    assert settings["beta_start"] == pytest.approx(0.00085) and settings["beta_end"] == pytest.approx(0.012)
    assert settings["prediction_type"] == "v_prediction" and "trained_betas" not in settings


@pytest.mark.parametrize("settings, words", [
    ({"beta_schedule": "sigmoid"}, 'beta_schedule "sigmoid" is unknown'),
    ({"prediction_type": "v_predict"}, 'nearest: v_prediction'),
])
def test_unknown_schedules_and_predictions_are_refused(settings, words, tmp_path):
    (tmp_path / "scheduler_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=words):
        load_schedule(tmp_path)


def test_each_scheduler_setting_changes_the_schedule(tmp_path):
    def load(**settings):
        (tmp_path / "scheduler_config.json").write_text(json.dumps(settings))
        return load_schedule(tmp_path)
    plain, kind = load()
    assert kind == "noise" and torch.equal(plain.beta, Schedule.linear().beta)
    assert load(prediction_type="sample")[1] == "x0" and load(prediction_type="v_prediction")[1] == "v"
    assert load(rescale_betas_zero_snr=True)[0].alpha_bar[-1] == 0
    assert load(num_train_timesteps=10)[0].T == 10
    assert load(trained_betas=[0.1, 0.2])[0].beta.tolist() == [0.1, 0.2]
    for settings in ({"beta_start": 1e-3}, {"beta_end": 1e-2}, {"beta_schedule": "scaled_linear"},
                     {"beta_schedule": "squaredcos_cap_v2"}):
        assert not torch.equal(load(**settings)[0].beta, plain.beta)


def test_a_schedule_is_found_in_a_models_scheduler_folder(tmp_path):
    save_schedule(Schedule.cosine(20), "v", tmp_path / "model" / "scheduler")
    assert load_schedule(tmp_path / "model")[1] == "v"


@pytest.mark.parametrize("header", [
    b'{"a":{"dtype":"F32","shape":[4294967296,4294967296,4],"data_offsets":[0,4]}}',
    b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,18446744073709551615]}}',
    b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}' + b" " * 100,
])
def test_malformed_safetensors_are_refused_by_name(header, tmp_path):
    (tmp_path / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(UserError, match=WEIGHTS):
        read_safetensors(tmp_path / WEIGHTS)


def test_a_giant_header_is_refused_without_reading_it(tmp_path):
    (tmp_path / WEIGHTS).write_bytes((1 << 60).to_bytes(8, "little") + bytes(100))
    with pytest.raises(UserError, match=WEIGHTS):
        read_safetensors(tmp_path / WEIGHTS)
