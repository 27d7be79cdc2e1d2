"""LoRA files: every naming that is met gives the same parts, every key is used, and what is written is read back."""

import json
import math

import pytest
import torch
from conftest import same
from safetensors.torch import load_file, save_file
from torch import nn

from nanodiff.errors import UserError
from nanodiff.formats.lora_file import layer_names, locate_layer, original_name, parse_lora, read_lora, write_lora
from nanodiff.formats.weights import read_metadata
from nanodiff.models.lora import LoraLayer, LoraPart, delta, layers

ATTENTION = "attentions.0.transformer_blocks.0"
UNET = {
    "conv_in": nn.Conv2d(4, 8, 3, padding=1),
    "time_embedding.linear_1": nn.Linear(8, 12),
    "down_blocks.0.resnets.0.conv1": nn.Conv2d(8, 8, 3, padding=1),
    "down_blocks.0.resnets.0.time_emb_proj": nn.Linear(12, 8),
    "down_blocks.0.resnets.1.conv1": nn.Conv2d(8, 8, 3, padding=1),
    "down_blocks.0.attentions.0.proj_in": nn.Conv2d(8, 8, 1),
    f"down_blocks.0.{ATTENTION}.attn1.to_q": nn.Linear(8, 8, bias=False),
    f"down_blocks.0.{ATTENTION}.attn2.to_k": nn.Linear(6, 8, bias=False),
    f"down_blocks.0.{ATTENTION}.attn2.to_out.0": nn.Linear(8, 8),
    f"down_blocks.0.{ATTENTION}.ff.net.0.proj": nn.Linear(8, 64),
    "down_blocks.0.downsamplers.0.conv": nn.Conv2d(8, 8, 3, stride=2, padding=1),
    "down_blocks.1.resnets.0.conv_shortcut": nn.Conv2d(8, 16, 1),
    "down_blocks.1.resnets.1.conv2": nn.Conv2d(16, 16, 3, padding=1),
    "mid_block.resnets.1.conv1": nn.Conv2d(16, 16, 3, padding=1),
    "mid_block.attentions.0.proj_out": nn.Linear(16, 16),
    "up_blocks.0.resnets.1.conv1": nn.Conv2d(24, 16, 3, padding=1),
    "up_blocks.0.resnets.2.conv1": nn.Conv2d(24, 16, 3, padding=1),
    "up_blocks.0.upsamplers.0.conv": nn.Conv2d(16, 16, 3, padding=1),
    "up_blocks.1.attentions.2.proj_in": nn.Conv2d(8, 8, 1),
    "up_blocks.1.upsamplers.0.conv": nn.Conv2d(8, 8, 3, padding=1),
    "conv_out": nn.Conv2d(8, 4, 3, padding=1),
}
TEXT = {
    "encoder.layers.0.self_attn.q_proj": nn.Linear(6, 6),
    "encoder.layers.0.self_attn.out_proj": nn.Linear(6, 6),
    "encoder.layers.0.mlp.fc1": nn.Linear(6, 24),
    "encoder.layers.1.mlp.fc1": nn.Linear(6, 24),
}
# The same U-Net layers as the original latent diffusion code counts them.
ORIGINAL = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "down_blocks.0.resnets.0.conv1": "input_blocks.1.0.in_layers.2",
    "down_blocks.0.resnets.0.time_emb_proj": "input_blocks.1.0.emb_layers.1",
    "down_blocks.0.resnets.1.conv1": "input_blocks.2.0.in_layers.2",
    "down_blocks.0.attentions.0.proj_in": "input_blocks.1.1.proj_in",
    f"down_blocks.0.{ATTENTION}.attn1.to_q": "input_blocks.1.1.transformer_blocks.0.attn1.to_q",
    f"down_blocks.0.{ATTENTION}.attn2.to_k": "input_blocks.1.1.transformer_blocks.0.attn2.to_k",
    f"down_blocks.0.{ATTENTION}.attn2.to_out.0": "input_blocks.1.1.transformer_blocks.0.attn2.to_out.0",
    f"down_blocks.0.{ATTENTION}.ff.net.0.proj": "input_blocks.1.1.transformer_blocks.0.ff.net.0.proj",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
    "down_blocks.1.resnets.0.conv_shortcut": "input_blocks.4.0.skip_connection",
    "down_blocks.1.resnets.1.conv2": "input_blocks.5.0.out_layers.3",
    "mid_block.resnets.1.conv1": "middle_block.2.in_layers.2",
    "mid_block.attentions.0.proj_out": "middle_block.1.proj_out",
    "up_blocks.0.resnets.1.conv1": "output_blocks.1.0.in_layers.2",
    "up_blocks.0.resnets.2.conv1": "output_blocks.2.0.in_layers.2",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.2.1.conv",
    "up_blocks.1.attentions.2.proj_in": "output_blocks.5.1.proj_in",
    "up_blocks.1.upsamplers.0.conv": "output_blocks.5.2.conv",
    "conv_out": "out.2",
}


def tree(named):
    """A network with these layers at these paths."""
    net = nn.Module()
    for path, layer in named.items():
        *parents, leaf = path.split(".")
        parent = net
        for name in parents:
            if name not in parent._modules:
                parent.add_module(name, nn.Module())
            parent = getattr(parent, name)
        parent.add_module(leaf, layer)
    return net


def networks():
    return {"unet": tree(UNET), "text_model": tree(TEXT)}


def random_parts(rank=2, alpha=lambda i: 1.0 + i % 3, keep=lambda network, path: True):
    """One part for every layer, with alphas that differ; a convolution's down has the layer's kernel."""
    draw = torch.Generator().manual_seed(3)
    parts = []
    for network, named in (("unet", UNET), ("text_model", TEXT)):
        for i, (path, layer) in enumerate(named.items()):
            if keep(network, path):
                shape = layer.weight.shape
                down = torch.randn(rank, *shape[1:], generator=draw)
                up = torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=draw)
                parts.append(LoraPart(network, path, down, up, alpha(i)))
    return parts


def by_layer(parts):
    return {(part.network, part.layer): part for part in parts}


def assert_same_parts(found, expected):
    found, expected = by_layer(found), by_layer(expected)
    assert found.keys() == expected.keys()
    for key, part in expected.items():
        assert same(found[key].down, part.down) and same(found[key].up, part.up), key
        assert found[key].alpha == part.alpha, key


def keys_of(part, form):
    """The part's tensors under the names that one tool or another gives them."""
    text, layer = part.network == "text_model", part.layer
    name, down, up = ("text_encoder.text_model." if text else "unet.") + layer, ".lora_A.weight", ".lora_B.weight"
    if form == "adapter name":
        down, up = ".lora_A.default.weight", ".lora_B.default.weight"
    elif form == "compiled":
        name = name.replace(".", "._orig_mod.", 1)
    elif form == "flat text encoder":
        name = name.replace("text_model.", "")
    elif form == "peft":
        name = f"base_model.model.{'text_model.' if text else ''}{layer}"
    elif form == "older diffusers" or form.startswith("attention") and "attn" not in layer:
        name += ".lora_linear_layer" if text else ".lora"
        down, up = ".down.weight", ".up.weight"
    elif form.startswith("attention processor"):
        for ours, theirs in (("attn1.", "attn1.processor."), ("attn2.", "attn2.processor."), ("to_out.0", "to_out"),
                             ("q_proj", "to_q"), ("out_proj", "to_out")):
            name = name.replace(ours, theirs)
        name = name.removeprefix("unet.") if form.endswith("without prefix") else name
        down, up = "_lora.down.weight", "_lora.up.weight"
    elif form.startswith("kohya"):
        layer = ORIGINAL[layer] if form == "kohya with original names" and not text else layer
        start = "lora_te1_" if form == "kohya by diffusers" else "lora_te_text_model_"
        name = (start if text else "lora_unet_") + layer.replace(".", "_")
        down, up = ".lora_down.weight", ".lora_up.weight"
    return {name + down: part.down, name + up: part.up, f"{name}.alpha": torch.tensor(part.alpha)}


FORMS = {"diffusers": "diffusers", "adapter name": "diffusers", "compiled": "diffusers",
         "flat text encoder": "diffusers", "peft": "peft", "older diffusers": "older diffusers",
         "attention processor": "attention processor + older diffusers",
         "attention processor without prefix": "attention processor + older diffusers", "kohya": "kohya",
         "kohya by diffusers": "kohya", "kohya with original names": "kohya"}


@pytest.mark.parametrize("form", FORMS)
def test_every_naming_gives_the_same_parts(form, tmp_path):
    parts = random_parts()
    tensors = {key: tensor for part in parts for key, tensor in keys_of(part, form).items()}
    save_file(tensors, tmp_path / "lora.safetensors")
    assert_same_parts(read_lora(tmp_path / "lora.safetensors", networks()), parts)
    naming, found = parse_lora(tmp_path / "lora.safetensors")
    assert naming == FORMS[form] and len(found) == len(parts)
    torch.save(tensors, tmp_path / "lora.bin")
    assert_same_parts(read_lora(tmp_path / "lora.bin", networks()), parts)


def test_namings_may_be_mixed_in_one_file(tmp_path):
    parts = random_parts()
    forms = ["diffusers", "kohya", "older diffusers", "kohya with original names"]
    save_file({key: tensor for i, part in enumerate(parts) for key, tensor in keys_of(part, forms[i % 4]).items()},
              tmp_path / "lora.safetensors")
    assert_same_parts(read_lora(tmp_path / "lora.safetensors", networks()), parts)
    assert parse_lora(tmp_path / "lora.safetensors")[0] == "diffusers + kohya + older diffusers"


def test_original_names_are_those_of_the_latent_diffusion_code():
    names = layer_names(tree(UNET))
    for path, original in ORIGINAL.items():
        assert names[original] == names[original.replace(".", "_")] == names[path] == path
    assert original_name("up_blocks.3.attentions.1.transformer_blocks.0.attn2.to_v", 2) == \
        "output_blocks.10.1.transformer_blocks.0.attn2.to_v"


def test_alpha_is_per_layer_and_its_absence_means_the_rank(tmp_path):
    first, second, third = (by_layer(random_parts())["unet", path] for path in (
        "conv_in", "conv_out", f"down_blocks.0.{ATTENTION}.attn1.to_q"))
    tensors = keys_of(first, "kohya") | keys_of(second, "kohya") | keys_of(third, "kohya")
    tensors["lora_unet_conv_in.alpha"] = torch.tensor(1.0)
    tensors["lora_unet_conv_out.alpha"] = torch.tensor(8, dtype=torch.int64)
    del tensors[next(key for key in tensors if "to_q.alpha" in key)]
    save_file(tensors, tmp_path / "lora.safetensors")
    found = by_layer(read_lora(tmp_path / "lora.safetensors", networks()))
    for part, alpha in ((first, 1.0), (second, 8.0), (third, 2.0)):
        change = delta(found[part.network, part.layer])
        up, down = part.up.flatten(1), part.down.flatten(1)
        assert torch.equal(change, (alpha / 2 * (up @ down)).reshape(change.shape))
    assert parse_lora(tmp_path / "lora.safetensors")[1]["lora_unet_conv_out"]["alpha"] == 8
    assert sum(held["alpha"] is None for held in parse_lora(tmp_path / "lora.safetensors")[1].values()) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("names", ["diffusers", "kohya"])
def test_what_is_written_is_read_back_with_its_alphas(names, dtype, tmp_path):
    parts = random_parts(alpha=lambda i: [8.0, 0.5, 2.0][i % 3])
    wide = random_parts(3, lambda i: 1 / 3, lambda network, path: path in ("conv_in", "encoder.layers.0.mlp.fc1"))
    parts = list((by_layer(parts) | by_layer(wide)).values())  # two ranks in one file
    for part in parts:
        part.down, part.up = part.down.to(dtype), part.up.to(dtype)
        if names == "kohya":
            part.alpha = float(torch.tensor(part.alpha))  # the file holds it in float32
    write_lora(tmp_path / "lora.safetensors", parts, names, {"trained_on": "weaves"})
    assert_same_parts(read_lora(tmp_path / "lora.safetensors", networks()), parts)
    assert parse_lora(tmp_path / "lora.safetensors")[0] == names
    assert read_metadata(tmp_path / "lora.safetensors")["trained_on"] == "weaves"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lora.safetensors"]


def test_diffusers_names_carry_alphas_where_diffusers_looks_for_them(tmp_path):
    parts = random_parts(alpha=lambda i: 4.0 if i else 6.0)
    write_lora(tmp_path / "lora.safetensors", parts)
    keys = load_file(tmp_path / "lora.safetensors").keys()
    assert "unet.conv_in.lora_A.weight" in keys
    assert "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_B.weight" in keys
    settings = json.loads(read_metadata(tmp_path / "lora.safetensors")["lora_adapter_metadata"])
    assert settings["unet.r"] == settings["text_encoder.r"] == 2 and settings["unet.lora_alpha"] == 4
    assert settings["unet.alpha_pattern"] == {"^conv_in": 6} and settings["unet.rank_pattern"] == {}
    assert settings["text_encoder.alpha_pattern"] == {"encoder.layers.0.self_attn.q_proj": 6}
    assert settings["unet.target_modules"] == sorted(UNET)


def test_kohya_names_are_spelt_with_underscores_and_an_alpha_each(tmp_path):
    parts = random_parts()
    write_lora(tmp_path / "lora.safetensors", parts, "kohya")
    expected = {key: tensor for part in parts for key, tensor in keys_of(part, "kohya").items()}
    assert same(load_file(tmp_path / "lora.safetensors"), expected)


def without_alpha(parts, form):
    return {key: tensor for part in parts for key, tensor in keys_of(part, form).items() if "alpha" not in key}


def test_alphas_are_read_from_the_settings_of_diffusers_and_of_peft(tmp_path):
    parts = random_parts(keep=lambda network, path: path != "conv_out")
    expected = {key: 3.0 if key[0] == "unet" else 5.0 for key in by_layer(parts)}
    expected |= {key: 7.0 for key in expected if key[1].endswith("conv1")}
    expected["unet", "conv_in"] = 1.0
    settings = {"unet.lora_alpha": 3, "unet.alpha_pattern": {"conv1": 7, "^conv_in": 1}, "text_encoder.lora_alpha": 5}
    tensors = without_alpha(parts, "diffusers")
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(settings)})
    found = read_lora(tmp_path / "a.safetensors", networks())
    assert {(part.network, part.layer): part.alpha for part in found} == expected

    unet_parts = [part for part in parts if part.network == "unet"]
    settings = {"lora_alpha": 3, "alpha_pattern": {r"resnets\.1\.conv1": 7}, "use_rslora": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    save_file(without_alpha(unet_parts, "peft"), tmp_path / "adapter_model.safetensors")
    found = read_lora(tmp_path / "adapter_model.safetensors", networks())
    for part in found:  # rank-stabilised: the change is alpha / sqrt(rank) * up @ down
        alpha = 7 if part.layer.endswith("resnets.1.conv1") else 3
        assert math.isclose(part.alpha / 2, alpha / math.sqrt(2))

    settings = {"unet.alpha_pattern": {"(a+)+$": 1}}
    save_file(tensors, tmp_path / "b.safetensors", {"lora_adapter_metadata": json.dumps(settings)})
    with pytest.raises(UserError, match="alpha_pattern.*is not supported"):
        read_lora(tmp_path / "b.safetensors", networks())
    for broken in ("[1]", "{"):
        save_file(tensors, tmp_path / "b.safetensors", {"lora_adapter_metadata": broken})
        with pytest.raises(UserError, match="not a JSON object"):
            read_lora(tmp_path / "b.safetensors", networks())


def test_linear_factors_stored_as_convolutions_fit_and_the_reverse(tmp_path):
    parts = random_parts()
    changed = {}
    for part in parts:
        shape = part.down.shape[2:]
        for key, tensor in keys_of(part, "kohya").items():
            if "alpha" not in key:
                if not shape:
                    tensor = tensor[:, :, None, None]
                elif tensor.shape[2:] == (1, 1):
                    tensor = tensor[:, :, 0, 0]
            changed[key] = tensor.contiguous()
    save_file(changed, tmp_path / "lora.safetensors")
    assert_same_parts(read_lora(tmp_path / "lora.safetensors", networks()), parts)


def test_a_convolution_in_three_factors_equals_its_three_convolutions(tmp_path):
    draw = torch.Generator().manual_seed(1)
    down, mid, up = (torch.randn(*shape, generator=draw) for shape in ((2, 8, 1, 1), (2, 2, 3, 3), (8, 2, 1, 1)))
    name = "lora_unet_down_blocks_0_downsamplers_0_conv"
    save_file({f"{name}.lora_down.weight": down, f"{name}.lora_mid.weight": mid, f"{name}.lora_up.weight": up,
               f"{name}.alpha": torch.tensor(1.0)}, tmp_path / "lora.safetensors")
    part, = read_lora(tmp_path / "lora.safetensors", networks())
    x = torch.randn(1, 8, 6, 6, generator=draw)
    conv = torch.nn.functional.conv2d
    expected = 0.5 * conv(conv(conv(x, down), mid, stride=2, padding=1), up)
    assert torch.allclose(conv(x, delta(part), stride=2, padding=1), expected, atol=1e-5)


def test_layers_are_found_by_their_plain_names_in_compiled_and_adapted_networks():
    net = tree(UNET)
    plain = layers(net)
    assert plain.keys() == UNET.keys()
    net.conv_in = LoraLayer(net.conv_in)
    assert layers(torch.compile(net)) == plain
    net.conv_in = net.conv_in.base


def test_locate_layer_tells_networks_apart():
    assert locate_layer("text_model.encoder.layers.0.mlp.fc1") == ("text_model", "encoder.layers.0.mlp.fc1")
    assert locate_layer("lora_te_text_model_encoder_layers_0_mlp_fc1") == ("text_model", "encoder_layers_0_mlp_fc1")
    assert locate_layer("base_model.model.unet.conv_in") == ("unet", "conv_in")
    assert locate_layer("mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out") == (
        "unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0")


NAME = "lora_unet_conv_in"
DOWN, UP = torch.ones(2, 4, 3, 3), torch.ones(8, 2, 1, 1)
GOOD = {f"{NAME}.lora_down.weight": DOWN, f"{NAME}.lora_up.weight": UP}


@pytest.mark.parametrize("changes, words", [
    ({f"{NAME}.lora_up.weight": None}, '"lora_unet_conv_in" has down but no up'),
    ({f"{NAME}.lora_down.weight": None}, '"lora_unet_conv_in" has up but no down'),
    ({"lora_unet_conv_out.alpha": torch.tensor(1.0)}, '"lora_unet_conv_out" has alpha but no down'),
    ({f"{NAME}.lora_down.weights": DOWN}, f'weights" is not part of a LoRA.*nearest: {NAME}.lora_down.weight'),
    ({"unet.conv_in.weight": DOWN}, '"unet.conv_in.weight" is not part of a LoRA'),
    ({f"{NAME}.lora_down.weight": DOWN * float("nan")}, "finite numbers"),
    ({f"{NAME}.alpha": torch.tensor(float("inf"))}, "finite numbers"),
    ({f"{NAME}.lora_up.weight": UP.int()}, "floating-point"),
    ({f"{NAME}.alpha": torch.ones(2)}, "alpha must be one number"),
    ({f"{NAME}.lora_up.weight": torch.ones(8, 3, 1, 1)}, r"\[2, 4, 3, 3\] and up \[8, 3, 1, 1\] do not share one rank"),
    ({f"{NAME}.lora_up.weight": torch.ones(8)}, "do not share one rank"),
    ({f"{NAME}.lora_mid.weight": torch.ones(2, 2, 3, 3)}, "mid .* does not fit"),
    ({"unet.conv_in.lora_A.weight": DOWN, "unet.conv_in.lora_B.weight": UP}, 'changes "conv_in" twice'),
    ({"unet.conv_in.lora_A.weight": DOWN, "unet._orig_mod.conv_in.lora_A.weight": DOWN}, "holds down of .* twice"),
    ({f"{NAME}.lora_down.weight": torch.ones(2, 5, 3, 3)},
     r'"conv_in" has down \[2, 5, 3, 3\] and up \[8, 2, 1, 1\], expected \[2, 4, 3, 3\].*another base model'),
    ({f"{NAME}.lora_down.weight": torch.ones(2, 4)}, "expected .*another base model"),
    ({"lora_unet_conv_inn.lora_down.weight": DOWN, "lora_unet_conv_inn.lora_up.weight": UP},
     r'1 of its 2 layers are not in the model, for example "lora_unet_conv_inn" \(nearest: .*conv_in'),
    ({"lora_te_text_model_encoder_layers_12_mlp_fc1.lora_down.weight": torch.ones(1, 6),
      "lora_te_text_model_encoder_layers_12_mlp_fc1.lora_up.weight": torch.ones(24, 1)},
     r"nearest: encoder\.layers\.0\.mlp\.fc1, encoder\.layers\.1\.mlp\.fc1"),
    ({f"{NAME}.hada_w1_a": DOWN}, "LoHa.*not supported"),
    ({f"{NAME}.lokr_w1": DOWN}, "LoKr.*not supported"),
    ({f"{NAME}.dora_scale": DOWN}, "DoRA.*not supported"),
    ({"unet.conv_in.lora_magnitude_vector": DOWN}, "DoRA.*not supported"),
    ({f"{NAME}.diff": DOWN}, "whole differences.*not supported"),
    ({"unet.conv_in.lora_B.bias": DOWN}, "with biases.*not supported"),
    ({"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": DOWN}, "SDXL.*not supported"),
    ({"transformer.x.lora_A.weight": DOWN}, "DiT.*not supported"),
])
def test_broken_and_foreign_files_are_refused_in_one_sentence(changes, words, tmp_path):
    path = tmp_path / "lora.safetensors"
    save_file(GOOD, path)
    assert len(read_lora(path, networks())) == 1
    save_file({key: tensor.clone() for key, tensor in (GOOD | changes).items() if tensor is not None}, path)
    with pytest.raises(UserError, match=words) as error:
        read_lora(path, networks())
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_lora_without_any_layer_in_the_networks_is_refused(tmp_path):
    write_lora(tmp_path / "lora.safetensors", random_parts(keep=lambda network, path: network == "text_model"))
    with pytest.raises(UserError, match="4 of its 4 layers .*no text_model to look in.*another base model"):
        read_lora(tmp_path / "lora.safetensors", {"unet": tree(UNET)})
    save_file({}, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match="holds no LoRA"):
        read_lora(tmp_path / "lora.safetensors", networks())


def test_layers_that_are_no_ordinary_convolutions_are_refused(tmp_path):
    save_file(GOOD, tmp_path / "lora.safetensors")
    for layer in (nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect")):
        with pytest.raises(UserError, match="expected an ordinary one"):
            read_lora(tmp_path / "lora.safetensors", {"unet": tree({"conv_in": layer})})


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    torch.save({**GOOD, "trap": print}, tmp_path / "lora.bin")
    with pytest.raises(UserError, match="was refused"):
        read_lora(tmp_path / "lora.bin", networks())


def test_nothing_wrong_is_written(tmp_path):
    path = tmp_path / "lora.safetensors"
    good = LoraPart("unet", "conv_in", DOWN, UP, 2.0)
    for parts, names, words in (
        ([good], "kohja", "nearest: kohya"),
        ([], "kohya", "nothing to write"),
        ([good, good], "diffusers", 'changes "conv_in" twice'),
        ([LoraPart("vae", "conv_in", DOWN, UP, 2.0)], "kohya", 'network "vae" is unknown'),
        ([LoraPart("unet", "conv_in", DOWN, UP * float("inf"), 2.0)], "kohya", "not finite"),
        ([LoraPart("unet", "conv_in", DOWN, UP, math.nan)], "diffusers", "not finite"),
    ):
        with pytest.raises(UserError, match=words):
            write_lora(path, parts, names)
    assert list(tmp_path.iterdir()) == []
