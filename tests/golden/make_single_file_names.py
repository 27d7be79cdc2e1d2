"""What diffusers' own converters make of the keys of a single file: writes single_file_names.json for its test.

    pip install diffusers==0.42.1 transformers==5.23.0 && python tests/golden/make_single_file_names.py

The keys of a single file are written down here as CompVis' constructors name their layers, walking as those walk. Each
gets a tensor with a number in it and goes through diffusers' converters; that these know every key, and give every
weight that diffusers' networks have, shows that the walk is right. Stored: {the file's key: diffusers' key, or the
three of a fused one} for the models of tests/tiny_sd.py.
"""

import json
import pathlib
import sys

import torch

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))


def both(name, bias=True):
    return [f"{name}.weight", f"{name}.bias"] if bias else [f"{name}.weight"]


def res_block(name, before, after):
    """openaimodel.py, ResBlock: a skip_connection only where the number of channels changes."""
    parts = ["in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3"]
    return [key for part in parts + ["skip_connection"] * (before != after) for key in both(f"{name}.{part}")]


def spatial_transformer(name):
    """attention.py, SpatialTransformer with one BasicTransformerBlock: to_q, to_k and to_v have no bias."""
    keys = both(f"{name}.norm") + both(f"{name}.proj_in") + both(f"{name}.proj_out")
    block = f"{name}.transformer_blocks.0"
    for attention in ("attn1", "attn2"):
        keys += [f"{block}.{attention}.to_{x}.weight" for x in "qkv"] + both(f"{block}.{attention}.to_out.0")
    for part in ("ff.net.0.proj", "ff.net.2", "norm1", "norm2", "norm3"):
        keys += both(f"{block}.{part}")
    return keys


def unet_keys(s):
    """openaimodel.py, UNetModel.__init__: blocks are appended to three lists and numbered by their place in them."""
    keys = both("time_embed.0") + both("time_embed.2") + both("input_blocks.0.0")
    channels, layers = s["block_out_channels"], s["layers_per_block"]
    attention = [kind.startswith("CrossAttn") for kind in s["down_block_types"]]
    ch, stack, number = channels[0], [channels[0]], 1
    for level, width in enumerate(channels):
        for _ in range(layers):
            keys += res_block(f"input_blocks.{number}.0", ch, width)
            ch = width
            keys += spatial_transformer(f"input_blocks.{number}.1") if attention[level] else []
            stack.append(ch)
            number += 1
        if level != len(channels) - 1:
            keys += both(f"input_blocks.{number}.0.op")
            stack.append(ch)
            number += 1
    keys += res_block("middle_block.0", ch, ch) + spatial_transformer("middle_block.1")
    keys += res_block("middle_block.2", ch, ch)
    number = 0
    for level, width in reversed(list(enumerate(channels))):
        for i in range(layers + 1):
            keys += res_block(f"output_blocks.{number}.0", ch + stack.pop(), width)
            ch, inner = width, 1
            if attention[level]:
                keys += spatial_transformer(f"output_blocks.{number}.1")
                inner = 2
            if level and i == layers:
                keys += both(f"output_blocks.{number}.{inner}.conv")
            number += 1
    return keys + both("out.0") + both("out.2")


def autoencoder_keys(s):
    """model.py, Encoder and Decoder: the decoder builds its levels from the smallest, and puts each in front."""
    def block(name, before, after):
        parts = ["norm1", "conv1", "norm2", "conv2"] + ["nin_shortcut"] * (before != after)
        return [key for part in parts for key in both(f"{name}.{part}")]

    keys, channels, layers = [], s["block_out_channels"], s["layers_per_block"]
    for side in ("encoder", "decoder"):
        keys += both(f"{side}.conv_in") + both(f"{side}.norm_out") + both(f"{side}.conv_out")
        for i in (1, 2):
            keys += block(f"{side}.mid.block_{i}", channels[-1], channels[-1])
        for part in ("norm", "q", "k", "v", "proj_out"):
            keys += both(f"{side}.mid.attn_1.{part}")
    ch = channels[0]
    for level, width in enumerate(channels):
        for i in range(layers):
            keys += block(f"encoder.down.{level}.block.{i}", ch, width)
            ch = width
        keys += both(f"encoder.down.{level}.downsample.conv") if level != len(channels) - 1 else []
    for level, width in reversed(list(enumerate(channels))):
        for i in range(layers + 1):
            keys += block(f"decoder.up.{level}.block.{i}", ch, width)
            ch = width
        keys += both(f"decoder.up.{level}.upsample.conv") if level else []
    return keys + both("quant_conv") + both("post_quant_conv")


def text_keys(s, open_clip):
    """transformers' CLIPTextModel as it was when CompVis saved it, or open_clip's text transformer."""
    if open_clip:
        keys = ["positional_embedding", "token_embedding.weight", *both("ln_final")]
        for n in range(s["num_hidden_layers"]):
            name = f"transformer.resblocks.{n}"
            keys += [f"{name}.attn.in_proj_weight", f"{name}.attn.in_proj_bias"]
            for part in ("attn.out_proj", "ln_1", "ln_2", "mlp.c_fc", "mlp.c_proj"):
                keys += both(f"{name}.{part}")
        return keys
    keys = ["embeddings.position_embedding.weight", "embeddings.token_embedding.weight", *both("final_layer_norm")]
    for n in range(s["num_hidden_layers"]):
        parts = [f"self_attn.{x}_proj" for x in ("q", "k", "v", "out")]
        for part in [*parts, "layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"]:
            keys += both(f"encoder.layers.{n}.{part}")
    return ["text_model." + key for key in keys]


def numbered(keys, prefix, rows=3):
    """{key: a small tensor that holds the key's number}, in the form that the converters cut up."""
    shape = {"attn_1": (1, 1, 1, 1), "in_proj_weight": (rows, 1), "in_proj_bias": (rows,)}
    return {prefix + key: torch.full(next((size for word, size in shape.items() if word in key), (1,)), float(i))
            for i, key in enumerate(keys)}


def paired(keys, prefix, converted, own):
    """{the file's key: diffusers' key or keys}; checks that nothing is lost and that nothing is missing."""
    converted = {key.removeprefix("text_model."): tensor for key, tensor in converted.items()}
    own = {key.removeprefix("text_model.") for key in own if not key.endswith("position_ids")}
    assert converted.keys() == own, sorted(converted.keys() ^ own)[:5]
    pairs = {}
    for key, tensor in converted.items():
        pairs.setdefault(prefix + keys[int(tensor.flatten()[0])], []).append(key)
    assert len(pairs) == len(keys)
    return {key: names[0] if len(names) == 1 else names for key, names in sorted(pairs.items())}


def main():
    import diffusers
    import transformers
    from diffusers.loaders import single_file_utils as reference

    import tiny_sd

    store = {"versions": {"diffusers": diffusers.__version__, "transformers": transformers.__version__}, "names": {}}
    for model in tiny_sd.NAMES:
        settings, pairs = tiny_sd.SETTINGS[model], {}
        with torch.device("meta"):
            unet = diffusers.UNet2DConditionModel.from_config(settings["unet"])
            vae = diffusers.AutoencoderKL.from_config(settings["vae"])
            text = transformers.CLIPTextModel(transformers.CLIPTextConfig(**settings["text_encoder"]))

        keys, prefix = unet_keys(settings["unet"]), "model.diffusion_model."
        converted = reference.convert_ldm_unet_checkpoint(numbered(keys, prefix), settings["unet"])
        pairs["unet"] = paired(keys, prefix, converted, unet.state_dict())

        keys, prefix = autoencoder_keys(settings["vae"]), "first_stage_model."
        converted = reference.convert_ldm_vae_checkpoint(numbered(keys, prefix), settings["vae"])
        pairs["autoencoder"] = paired(keys, prefix, converted, vae.state_dict())

        open_clip = model == "sd2"
        keys = text_keys(settings["text_encoder"], open_clip)
        if open_clip:  # the size of text_projection is where the converter cuts
            prefix = "cond_stage_model.model."
            held = {**numbered(keys, prefix), prefix + "text_projection": torch.zeros(1, 1)}
            converted = reference.convert_open_clip_checkpoint(text, held, prefix)
        else:
            prefix = "cond_stage_model.transformer."
            converted = reference.convert_ldm_clip_checkpoint(numbered(keys, prefix))
        pairs["text_model"] = paired(keys, prefix, converted, text.state_dict())
        store["names"][model] = pairs
    path = HERE / "single_file_names.json"
    path.write_text(json.dumps(store, indent=0) + "\n")
    print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
