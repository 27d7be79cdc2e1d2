"""The names of Stable Diffusion's weights in a single file: ours (diffusers' and transformers') and CompVis'.

The settings give one list of layers for each network, with both names and the shape of the weight. Reading and writing
use the same list, so they agree by construction.
Sources: the order of the layers in openaimodel.py and model.py of the latent-diffusion repository (Rombach et al. 2022,
arXiv 2112.10752), and OpenCLIP's names for the text encoder of Stable Diffusion 2.
"""

import re

from nanodiff.errors import UserError
from nanodiff.formats.stable_diffusion_folder import unet_config_from, vae_config_from
from nanodiff.models.clip_text import clip_text_config_from

UNET, AUTOENCODER, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
CLIP, OPEN_CLIP = TEXT + "transformer.text_model.", TEXT + "model."

UNET_RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
               "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
VAE_RESNET = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "conv_shortcut": "nin_shortcut"}
VAE_ATTENTION = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP_LAYER = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
                   "self_attn.out_proj": "attn.out_proj"}

# Variant spellings in files: (pattern, standard spelling).
SPELLINGS = [
    (r"_orig_mod\.", ""),  # torch.compile
    (r"^cond_stage_model\.clip_[lh]\.", TEXT),  # of older node editors
    (r"^conditioner\.embedders\.0\.", TEXT),
    (r"^cond_stage_model\.transformer\.(?=embeddings|encoder|final_layer_norm)", CLIP),  # of older transformers
    (r"(\.mid\.attn_1)\.(?:to_q|query)\.", r"\1.q."),  # of an autoencoder that came from a diffusers folder
    (r"(\.mid\.attn_1)\.(?:to_k|key)\.", r"\1.k."),
    (r"(\.mid\.attn_1)\.(?:to_v|value)\.", r"\1.v."),
    (r"(\.mid\.attn_1)\.(?:to_out\.0|proj_attn)\.", r"\1.proj_out."),
    (r"(\.mid\.attn_1)\.group_norm\.", r"\1.norm."),
]


# --- layers: (our name, CompVis' name, shape of the weight, whether there is a bias) ----------------------------------

def unet_layers(config):
    """The layers of a U-Net with this CondUNetConfig; CompVis numbers its blocks consecutively."""
    channels, levels = config.channels, len(config.channels)
    time = config.time_channels or 4 * channels[0]
    point = [] if config.linear_projection else [1, 1]

    def transformer(ours, theirs, c):
        yield f"{ours}.norm", f"{theirs}.norm", [c], True
        yield f"{ours}.proj_in", f"{theirs}.proj_in", [c, c, *point], True
        inner = [(f"norm{i}", [c], True) for i in (1, 2, 3)]
        for attention, width in (("attn1", c), ("attn2", config.context_channels)):
            inner += [(f"{attention}.to_q", [c, c], False), (f"{attention}.to_k", [c, width], False),
                      (f"{attention}.to_v", [c, width], False), (f"{attention}.to_out.0", [c, c], True)]
        inner += [("ff.net.0.proj", [8 * c, c], True), ("ff.net.2", [c, 4 * c], True)]
        for depth in range(config.transformer_layers):
            for name, shape, bias in inner:  # the same in both
                name = f"transformer_blocks.{depth}.{name}"
                yield f"{ours}.{name}", f"{theirs}.{name}", shape, bias
        yield f"{ours}.proj_out", f"{theirs}.proj_out", [c, c, *point], True

    yield "time_embedding.linear_1", "time_embed.0", [time, channels[0]], True
    yield "time_embedding.linear_2", "time_embed.2", [time, time], True
    yield "conv_in", "input_blocks.0.0", [channels[0], config.in_channels, 3, 3], True
    width, skips, n = channels[0], [channels[0]], 1
    for i, c in enumerate(channels):
        for j in range(config.blocks):
            ours = f"down_blocks.{i}.resnets.{j}"
            yield from resnet(ours, f"input_blocks.{n}.0", UNET_RESNET, width, c, time)
            if i in config.attention:
                yield from transformer(f"down_blocks.{i}.attentions.{j}", f"input_blocks.{n}.1", c)
            width, n = c, n + 1
            skips.append(width)
        if i < levels - 1:
            yield f"down_blocks.{i}.downsamplers.0.conv", f"input_blocks.{n}.0.op", [width, width, 3, 3], True
            skips.append(width)
            n += 1
    for j in (0, 1):
        yield from resnet(f"mid_block.resnets.{j}", f"middle_block.{2 * j}", UNET_RESNET, width, width, time)
    if config.mid_attention:
        yield from transformer("mid_block.attentions.0", "middle_block.1", width)
    n = 0
    for i, c in enumerate(channels[::-1]):
        attention = levels - 1 - i in config.attention
        for j in range(config.blocks + 1):
            ours = f"up_blocks.{i}.resnets.{j}"
            yield from resnet(ours, f"output_blocks.{n}.0", UNET_RESNET, width + skips.pop(), c, time)
            if attention:
                yield from transformer(f"up_blocks.{i}.attentions.{j}", f"output_blocks.{n}.1", c)
            width, n = c, n + 1
        if i < levels - 1:  # the last module of the level's last block
            place = f"output_blocks.{n - 1}.{1 + attention}.conv"
            yield f"up_blocks.{i}.upsamplers.0.conv", place, [c, c, 3, 3], True
    yield "conv_norm_out", "out.0", [width], True
    yield "conv_out", "out.2", [config.out_channels, width, 3, 3], True


def resnet(ours, theirs, names, before, after, time=None):
    """The layers of a ResNet block from `before` to `after` channels."""
    shapes = {"norm1": [before], "conv1": [after, before, 3, 3], "time_emb_proj": [after, time], "norm2": [after],
              "conv2": [after, after, 3, 3], "conv_shortcut": [after, before, 1, 1]}
    for name, other in names.items():
        if name != "conv_shortcut" or before != after:
            yield f"{ours}.{name}", f"{theirs}.{other}", shapes[name], True


def autoencoder_layers(config):
    """The layers of an autoencoder with this KLAutoencoderConfig; CompVis counts the decoder's levels backwards."""
    channels, levels, z = config.channels, len(config.channels), config.latent_channels
    deep = channels[-1]
    for side, down, ends in (("encoder", "down", (config.in_channels, channels[0], deep, 2 * z)),
                             ("decoder", "up", (z, deep, channels[0], config.out_channels))):
        yield f"{side}.conv_in", f"{side}.conv_in", [ends[1], ends[0], 3, 3], True
        width = ends[1]
        for i in range(levels):
            level = i if side == "encoder" else levels - 1 - i
            ours, theirs, c = f"{side}.{down}_blocks.{i}", f"{side}.{down}.{level}", channels[level]
            for j in range(config.blocks + (side == "decoder")):
                yield from resnet(f"{ours}.resnets.{j}", f"{theirs}.block.{j}", VAE_RESNET, width, c)
                width = c
            if i < levels - 1:
                yield f"{ours}.{down}samplers.0.conv", f"{theirs}.{down}sample.conv", [c, c, 3, 3], True
        if config.mid_attention:
            ours, theirs = f"{side}.mid_block.attentions.0", f"{side}.mid.attn_1"
            yield f"{ours}.group_norm", f"{theirs}.norm", [deep], True
            for name, other in VAE_ATTENTION.items():
                yield f"{ours}.{name}", f"{theirs}.{other}", [deep, deep], True
        for j in (0, 1):
            yield from resnet(f"{side}.mid_block.resnets.{j}", f"{side}.mid.block_{j + 1}", VAE_RESNET, deep, deep)
        yield f"{side}.conv_norm_out", f"{side}.norm_out", [ends[2]], True
        yield f"{side}.conv_out", f"{side}.conv_out", [ends[3], ends[2], 3, 3], True
    yield "quant_conv", "quant_conv", [2 * z, 2 * z, 1, 1], True
    yield "post_quant_conv", "post_quant_conv", [z, z, 1, 1], True


def text_layers(config, open_clip):
    """The layers of a text encoder with this ClipTextConfig; the other names are transformers' (ours) or OpenCLIP's."""
    d, mlp = config.width, config.mlp
    shapes = {"layer_norm1": [d], "layer_norm2": [d], "mlp.fc1": [mlp, d], "mlp.fc2": [d, mlp],
              "self_attn.out_proj": [d, d], **({} if open_clip else {f"self_attn.{x}_proj": [d, d] for x in "qkv"})}
    table, norm = "embeddings.token_embedding", "final_layer_norm"
    yield table, "token_embedding" if open_clip else table, [config.vocab_size, d], False
    yield norm, "ln_final" if open_clip else norm, [d], True
    for n in range(config.layers):
        ours, theirs = f"encoder.layers.{n}", f"transformer.resblocks.{n}" if open_clip else f"encoder.layers.{n}"
        for name, shape in shapes.items():
            yield f"{ours}.{name}", f"{theirs}.{OPEN_CLIP_LAYER[name] if open_clip else name}", shape, True


def names_in_file(settings, open_clip):
    """The place of our weights in a single file: {key in the file: (network, {our key: shape of our weight})}.

    settings   {"unet", "vae", "text_encoder": their config.json}
    open_clip  whether the text encoder has OpenCLIP's names; one tensor then holds queries, keys and values in this
               order, under three of our keys
    network is "unet", "autoencoder" or "text_model". UserError for settings that our networks do not know.
    """
    text = clip_text_config_from(settings["text_encoder"], "text_encoder/config.json")
    start, d = OPEN_CLIP if open_clip else CLIP, text.width
    names = {}
    for network, prefix, layers in (("unet", UNET, unet_layers(unet_config_from(settings["unet"]))),
                                    ("autoencoder", AUTOENCODER, autoencoder_layers(vae_config_from(settings["vae"]))),
                                    ("text_model", start, text_layers(text, open_clip))):
        for ours, theirs, shape, bias in layers:
            names[f"{prefix}{theirs}.weight"] = network, {f"{ours}.weight": shape}
            if bias:
                names[f"{prefix}{theirs}.bias"] = network, {f"{ours}.bias": shape[:1]}
    place = "positional_embedding" if open_clip else "embeddings.position_embedding.weight"
    names[start + place] = "text_model", {"embeddings.position_embedding.weight": [text.positions, d]}
    for n in range(text.layers if open_clip else 0):
        for end, shape in (("weight", [d, d]), ("bias", [d])):
            names[f"{start}transformer.resblocks.{n}.attn.in_proj_{end}"] = "text_model", {
                f"encoder.layers.{n}.self_attn.{x}_proj.{end}": shape for x in "qkv"}
    return names


def normalise_names(tensors, path):
    """{key: tensor} of a file with its keys in standard spelling; UserError when two keys become equal."""
    normalised = {}
    for key, tensor in tensors.items():
        new = key
        for pattern, usual in SPELLINGS:
            new = re.sub(pattern, usual, new)
        if new in normalised:
            raise UserError(f'{path} holds "{new}" twice, the second time as "{key}"')
        normalised[new] = tensor
    return normalised


def ema_name(key):
    """CompVis' name for the averaged (EMA) copy of a U-Net weight: the key without its dots."""
    return "model_ema." + "".join(key.split(".")[1:])
