"""Stable Diffusion as a folder in the layout of diffusers' StableDiffusionPipeline, read and written without it.

    model_index.json  scheduler/  tokenizer/  text_encoder/  unet/  vae/

Settings stay in diffusers' words until a network is built from them. Reading is strict: an unknown key or setting is an
error. Report: section 4.1.
"""

import os
from dataclasses import dataclass, field

import torch

from nanodiff import fast
from nanodiff.errors import UserError, nearest
from nanodiff.files import read_json
from nanodiff.formats.diffusers_folder import WEIGHTS, plain_names
from nanodiff.formats.weights import load_strictly, read_weights, write_folder
from nanodiff.models.clip_text import ClipText, Tokenizer, clip_text_config_from, clip_text_config_to
from nanodiff.models.cond_unet import CondUNet, CondUNetConfig
from nanodiff.models.kl_autoencoder import KLAutoencoder, KLAutoencoderConfig, Pixels, VQAutoencoder

PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline",
             "StableDiffusionInpaintPipelineLegacy")
# Folder of a part, our name of its network, file of its weights.
PARTS = [("unet", "unet", WEIGHTS), ("vae", "autoencoder", WEIGHTS),
         ("text_encoder", "text_model", "model.safetensors")]

# Settings of a UNet2DConditionModel that our config has under another name: (theirs, ours, their default).
UNET_NAMES = [
    ("in_channels", "in_channels", 4), ("out_channels", "out_channels", 4),
    ("block_out_channels", "channels", [320, 640, 1280, 1280]), ("cross_attention_dim", "context_channels", 1280),
    ("transformer_layers_per_block", "transformer_layers", 1), ("use_linear_projection", "linear_projection", False),
    ("norm_num_groups", "groups", 32), ("norm_eps", "eps", 1e-5), ("act_fn", "activation", "silu"),
    ("dropout", "dropout", 0.0), ("time_embedding_dim", "time_channels", None), ("freq_shift", "freq_shift", 0.0),
    ("flip_sin_to_cos", "flip_sin_to_cos", True), ("downsample_padding", "downsample_padding", 1),
]
# Settings with a single supported value, their default; any other would be another network.
UNET_FIXED = {
    "center_input_sample": False, "mid_block_scale_factor": 1, "dual_cross_attention": False,
    "only_cross_attention": False, "class_embed_type": None, "num_class_embeds": None, "addition_embed_type": None,
    "addition_embed_type_num_heads": 64, "addition_time_embed_dim": None, "encoder_hid_dim": None,
    "encoder_hid_dim_type": None, "resnet_time_scale_shift": "default", "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0, "time_embedding_type": "positional", "time_embedding_act_fn": None,
    "timestep_post_act": None, "time_cond_proj_dim": None, "conv_in_kernel": 3, "conv_out_kernel": 3,
    "projection_class_embeddings_input_dim": None, "attention_type": "default", "class_embeddings_concat": False,
    "mid_block_only_cross_attention": None, "cross_attention_norm": None, "num_attention_heads": None,
    "reverse_transformer_layers_per_block": None,
}
# Settings that are read below, with their defaults.
UNET_OTHER = {"down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
              "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
              "mid_block_type": "UNetMidBlock2DCrossAttn", "attention_head_dim": 8, "layers_per_block": 2}
# Settings without effect here (logits are at least float32 in our attention).
UNET_IDLE = ["sample_size", "upcast_attention"]
# One number, or a list with one for each level.
PER_LEVEL = ["transformer_layers_per_block", "cross_attention_dim", "attention_head_dim", "layers_per_block"]

VAE_NAMES = [
    ("in_channels", "in_channels", 3), ("out_channels", "out_channels", 3), ("latent_channels", "latent_channels", 4),
    ("block_out_channels", "channels", [64]), ("layers_per_block", "blocks", 1), ("norm_num_groups", "groups", 32),
    ("act_fn", "activation", "silu"), ("mid_block_add_attention", "mid_attention", True),
    ("scaling_factor", "scaling_factor", 0.18215), ("use_quant_conv", "quant_conv", True),
]
VAE_FIXED = {"shift_factor": 0.0, "latents_mean": None, "latents_std": None}
VAE_OTHER = {"down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"],
             "use_post_quant_conv": True}
PIXELS = {"_class_name": "Pixels"}  # no autoencoder at all
VAE_IDLE = ["sample_size", "force_upcast"]
# The same of a VQModel, which always has 1x1 convolutions around its codebook.
VQ_NAMES = [names for names in VAE_NAMES if names[1] != "quant_conv"] + [
    ("num_vq_embeddings", "codes", 256), ("vq_embed_dim", "code_channels", None)]
VQ_FIXED = {"norm_type": "group", "lookup_from_codebook": False}
GUIDANCE_KEYS = ("guidance", "guidance_start")  # with a leading "_" in model_index.json: others skip them
VQ_OTHER = {key: value for key, value in VAE_OTHER.items() if key != "use_post_quant_conv"}


@dataclass
class Checkpoint:
    """The content of a checkpoint, before any network is built from it.

    settings   {"unet", "vae", "text_encoder", "scheduler": {...}}, each in the words of diffusers' config.json, and
               perhaps GUIDANCE_KEYS, the guidance that is recommended for the model
    weights    {"unet", "autoencoder", "text_model": {name: tensor}}, under the names of our networks
    tokenizer  a Tokenizer
    notes      sentences on choices and on keys that were left out
    """

    settings: dict
    weights: dict
    tokenizer: Tokenizer
    notes: list = field(default_factory=list)

    def network(self, name, dtype=None):
        """The network "unet", "autoencoder" or "text_model", in eval mode and frozen.

        It holds the weights themselves, copied only to convert them to another dtype. UserError when a weight is
        missing, left over or misshapen.
        """
        with torch.device("meta"):
            if name == "unet":
                net = CondUNet(unet_config_from(self.settings["unet"]))
            elif name == "autoencoder" and self.settings["vae"] == PIXELS:
                net = Pixels()
            elif name == "autoencoder":
                net = KLAutoencoder(vae_config_from(self.settings["vae"]))
            else:
                net = ClipText(clip_text_config_from(self.settings["text_encoder"], "text_encoder/config.json"))
        weights = {key: tensor.to(dtype) for key, tensor in self.weights[name].items()} if dtype else self.weights[name]
        load_strictly(net, weights, f"the {name.replace('_', ' ')}'s weights", assign=True)
        return fast.speed_up(net.eval().requires_grad_(False))


def read_index(folder):
    """A folder's model_index.json; {} when there is none."""
    return read_json(folder, "model_index.json") if os.path.isfile(os.path.join(folder, "model_index.json")) else {}


def read_settings(folder):
    """{"unet", "vae", "text_encoder", "scheduler": their JSON} of a folder, and the GUIDANCE_KEYS of its index.

    UserError when one of the four is missing.
    """
    index = read_index(folder)
    settings = {part: read_json(os.path.join(folder, part), "config.json") for part, _, _ in PARTS}
    settings["scheduler"] = read_json(os.path.join(folder, "scheduler"), "scheduler_config.json")
    return settings | {name: index["_" + name] for name in GUIDANCE_KEYS
                       if isinstance(index.get("_" + name), (int, float))}


def read_folder(path):
    """The Checkpoint in a diffusers folder; UserError for a missing or broken file, or for another pipeline."""
    index = read_index(path)
    if index:
        pipeline = index.get("_class_name")
        if pipeline not in PIPELINES:
            tensors = f"a {pipeline}" if pipeline else "no pipeline's name"
            raise UserError(f'{path} holds {tensors}; expected one of {", ".join(PIPELINES)}'
                            + nearest(pipeline, PIPELINES))
    settings = read_settings(path)
    weights, notes = {}, []
    for part, name, file in PARTS:
        source = weight_file(os.path.join(path, part), file)
        if os.path.basename(source) != file:
            notes.append(f"{part}: {os.path.basename(source)} was taken, for want of {file}")
        tensors = plain_names(read_shards(source) if source.endswith(".json") else read_weights(source))
        weights[name] = strip_text_prefix(tensors) if name == "text_model" else tensors
    return Checkpoint(settings, weights, Tokenizer.from_folder(os.path.join(path, "tokenizer")), notes)


def strip_text_prefix(weights):
    """The weights of a CLIPTextModel under the names of our ClipText."""
    weights = {key.removeprefix("text_model."): tensor for key, tensor in weights.items()}
    weights.pop("embeddings.position_ids", None)  # 0 ... 76
    return weights


def weight_file(folder, name):
    """The path of a part's weights: the standard file, its half-precision variant, or an older pickled file."""
    stem = name.removesuffix(".safetensors")
    pickled = "pytorch_model" if stem == "model" else stem
    names = [name, f"{stem}.fp16.safetensors", f"{name}.index.json", f"{pickled}.bin", f"{pickled}.fp16.bin"]
    for candidate in names:
        if os.path.isfile(os.path.join(folder, candidate)):
            return os.path.join(folder, candidate)
    raise UserError(f"{folder} holds no weights; expected {names[0]}, or {', '.join(names[1:])}")


def read_shards(index):
    """{name: tensor} of weights in several files, which an index file lists."""
    folder, name = os.path.split(index)
    files = read_json(folder, name).get("weight_map")
    if not isinstance(files, dict):
        raise UserError(f"{index} names no files; expected a weight_map")
    weights = {}
    for file in sorted(set(files.values())):
        weights |= read_weights(os.path.join(folder, os.path.basename(file)))
    return weights


def write_checkpoint(checkpoint, path):
    """Write a Checkpoint as a folder that StableDiffusionPipeline.from_pretrained opens.

    A folder without an autoencoder (Pixels) opens in nanodiff alone: diffusers has no such part.
    """
    scheduler = checkpoint.settings["scheduler"].get("_class_name", "PNDMScheduler")
    inpainting = checkpoint.settings["unet"].get("in_channels") == 9
    index = {"_class_name": "StableDiffusionInpaintPipeline" if inpainting else "StableDiffusionPipeline",
             "_diffusers_version": "0.6.0", "feature_extractor": [None, None], "safety_checker": [None, None],
             "requires_safety_checker": False, "scheduler": ["diffusers", scheduler],
             "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
             "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    index |= {"_" + name: checkpoint.settings[name] for name in GUIDANCE_KEYS if name in checkpoint.settings}
    if checkpoint.settings["vae"] == PIXELS:
        index["vae"] = ["nanodiff", "Pixels"]
    for part, name, file in PARTS:
        weights = checkpoint.weights[name]
        if name == "text_model":
            weights = {f"text_model.{key}": tensor for key, tensor in weights.items()}
        write_folder(os.path.join(path, part), {"config.json": checkpoint.settings[part]}, {file: weights})
    write_folder(os.path.join(path, "scheduler"), {"scheduler_config.json": {"_class_name": scheduler,
                                                                            **checkpoint.settings["scheduler"]}}, {})
    checkpoint.tokenizer.save(os.path.join(path, "tokenizer"))
    write_folder(path, {"model_index.json": index}, {})  # last: it marks the folder as complete


def save_autoencoder(net, folder):
    """Write a KLAutoencoder as a folder for diffusers' AutoencoderKL, a VQAutoencoder as one for VQModel."""
    weights = {name: tensor for name, tensor in net.state_dict().items()
               if name not in ("quantize.counts", "quantize.sums", "quantize.idle")}  # a MovingCodebook's, for training
    write_folder(folder, {"config.json": vae_config_to(net.config)}, {WEIGHTS: weights})


def load_autoencoder(folder, dtype=torch.float32):
    """The KLAutoencoder or VQAutoencoder in a folder of save_autoencoder or in a diffusers model's vae/.

    In eval mode and frozen; config.json says which of the two. dtype: of its weights, whatever the file's. UserError,
    with the folder's name, for a missing or broken file, a setting that needs another network, and a weight that is
    missing, left over or misshapen.
    """
    try:
        config = vae_config_from(read_json(folder, "config.json"), "config.json", ("AutoencoderKL", "VQModel"))
    except UserError as error:
        nested = [name for name in ("model", "vae") if os.path.isfile(os.path.join(folder, name, "config.json"))]
        raise UserError(f"{folder} is no autoencoder's folder: {error}"
                        + "".join(f", nearest: {os.path.join(folder, name)}" for name in nested)) from None
    with torch.device("meta"):
        net = VQAutoencoder(config) if config.codes else KLAutoencoder(config)
    file = weight_file(folder, WEIGHTS)
    weights = read_shards(file) if file.endswith(".json") else read_weights(file)
    load_strictly(net, plain_names(weights), file, assign=True)
    return fast.speed_up(net.to(dtype).eval().requires_grad_(False))


def save_text_encoder(net, tokenizer, folder):
    """Write a ClipText and its Tokenizer as text_encoder/ and tokenizer/ of a folder; transformers opens both."""
    weights = {f"text_model.{key}": tensor for key, tensor in net.state_dict().items()}
    write_folder(os.path.join(folder, "text_encoder"), {"config.json": clip_text_config_to(net.config)},
                 {"model.safetensors": weights})
    tokenizer.save(os.path.join(folder, "tokenizer"))


def load_text_encoder(folder):
    """(ClipText, Tokenizer) from text_encoder/ and tokenizer/ of a folder of save_text_encoder or a diffusers model.

    The network is float32, in eval mode and frozen. UserError, with the folder's name, for a missing or broken file, a
    setting that needs another network, and a weight that is missing, left over or misshapen.
    """
    inner = os.path.join(folder, "text_encoder")
    nested = os.path.join(folder, "model")
    if not os.path.isdir(inner):
        raise UserError(f"{folder} holds no text encoder; expected a folder with text_encoder/ and tokenizer/"
                        + (f", nearest: {nested}" if os.path.isdir(os.path.join(nested, "text_encoder")) else ""))
    config = clip_text_config_from(read_json(inner, "config.json"), os.path.join(inner, "config.json"))
    with torch.device("meta"):
        net = ClipText(config)
    file = weight_file(inner, "model.safetensors")
    weights = plain_names(read_shards(file) if file.endswith(".json") else read_weights(file))
    load_strictly(net, strip_text_prefix(weights), file, assign=True)
    tokenizer = Tokenizer.from_folder(os.path.join(folder, "tokenizer"))
    return fast.speed_up(net.float().eval().requires_grad_(False)), tokenizer


# --- settings -------------------------------------------------------------------------------------------------------

def unet_config_from(settings, where="unet/config.json"):
    """The CondUNetConfig for a UNet2DConditionModel's settings; UserError for an unsupported setting."""
    _check(settings, ("UNet2DConditionModel",), UNET_NAMES, UNET_FIXED, UNET_OTHER, UNET_IDLE, where)
    fields = {ours: settings.get(theirs, default) for theirs, ours, default in UNET_NAMES}
    levels, merged = len(fields["channels"]), {**UNET_OTHER, **settings}
    fields["blocks"] = _one_number(merged["layers_per_block"], "layers_per_block", where)
    fields["transformer_layers"] = _one_number(fields["transformer_layers"], "transformer_layers_per_block", where)
    fields["context_channels"] = _one_number(fields["context_channels"], "cross_attention_dim", where)
    down, up = merged["down_block_types"], merged["up_block_types"]
    fields["attention"] = _attention_levels(down, "DownBlock2D", levels, where)
    if _attention_levels(up[::-1], "UpBlock2D", levels, where) != fields["attention"]:
        raise UserError(f"{where}: up_block_types {up} is not supported: expected attention at the levels of "
                        f"down_block_types {down}")
    middle = merged["mid_block_type"]
    if middle not in ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D"):
        raise UserError(f'{where}: mid_block_type "{middle}" is not supported, only UNetMidBlock2DCrossAttn and '
                        "UNetMidBlock2D are")
    fields["mid_attention"] = middle == "UNetMidBlock2DCrossAttn"
    heads = merged["attention_head_dim"]  # despite its name the number of heads
    fields["heads"] = tuple(heads) if isinstance(heads, (list, tuple)) else (heads,) * levels
    return CondUNetConfig(**fields)


def unet_config_to(config):
    """The settings of the UNet2DConditionModel that equals our config."""
    settings = {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.6.0", "center_input_sample": False,
                "mid_block_scale_factor": 1, "layers_per_block": config.blocks, "sample_size": 64}
    settings |= _named(config, UNET_NAMES)
    levels = range(len(config.channels))
    settings["down_block_types"] = ["CrossAttn" * (i in config.attention) + "DownBlock2D" for i in levels]
    settings["up_block_types"] = ["CrossAttn" * (i in config.attention) + "UpBlock2D" for i in reversed(levels)]
    settings["mid_block_type"] = "UNetMidBlock2DCrossAttn" if config.mid_attention else "UNetMidBlock2D"
    settings["attention_head_dim"] = list(config.heads) if len(set(config.heads)) > 1 else config.heads[0]
    return settings


def vae_config_from(settings, where="vae/config.json", kinds=("AutoencoderKL",)):
    """The KLAutoencoderConfig for an AutoencoderKL's settings, or a VQModel's when it is among `kinds`.

    UserError for an unsupported setting.
    """
    vq = "VQModel" in kinds and settings.get("_class_name") == "VQModel"
    names, fixed, other = (VQ_NAMES, VQ_FIXED, VQ_OTHER) if vq else (VAE_NAMES, VAE_FIXED, VAE_OTHER)
    _check(settings, kinds, names, fixed, other, VAE_IDLE, where)
    fields = {ours: settings.get(theirs, default) for theirs, ours, default in names}
    levels = len(fields["channels"])
    for key in ("down_block_types", "up_block_types"):
        supported = VAE_OTHER[key][0]
        types = settings.get(key, [supported] * levels)
        unsupported = sorted(set(types) - {supported})
        if unsupported:
            raise UserError(f'{where}: block type "{unsupported[0]}" is not supported, only {supported} is')
        if len(types) != levels:
            raise UserError(f"{where}: {len(types)} block types in {key} for {levels} levels")
    if not vq and settings.get("use_post_quant_conv", True) != fields["quant_conv"]:
        raise UserError(f"{where}: use_quant_conv and use_post_quant_conv differ; expected both or neither")
    return KLAutoencoderConfig(**fields)


def vae_config_to(config):
    """The settings of the AutoencoderKL that equals our config; of the VQModel when the config has a codebook."""
    levels = len(config.channels)
    shared = {"_diffusers_version": "0.6.0", "sample_size": 64 * config.factor,
              "down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
    if config.codes:
        return {"_class_name": "VQModel", **shared, **_named(config, VQ_NAMES)}
    return {"_class_name": "AutoencoderKL", **shared, "use_post_quant_conv": config.quant_conv,
            **_named(config, VAE_NAMES)}


def _named(config, names):
    values = {theirs: getattr(config, ours) for theirs, ours, _ in names}
    return {theirs: list(value) if isinstance(value, tuple) else value for theirs, value in values.items()}


def _check(settings, kinds, names, fixed, other, idle, where):
    """UserError unless the settings are of one of `kinds`, and each is a known one of its default's type."""
    if settings.get("_class_name", kinds[0]) not in kinds:
        raise UserError(f'{where} describes a {settings["_class_name"]}, expected a {" or a ".join(kinds)}')
    defaults = {theirs: default for theirs, _, default in names} | other
    known_keys = [*defaults, *fixed, *idle]
    for key, value in settings.items():
        if key in defaults and not _like(value, defaults[key], key in PER_LEVEL):
            raise UserError(f"{where}: {key} is {value!r}, expected a value such as {defaults[key]!r}")
        values = value if isinstance(value, (list, tuple)) and value else [value]  # one for all levels or one per level
        if key in fixed and any(item != fixed[key] and (item or fixed[key]) for item in values):
            raise UserError(f"{where}: {key} {value!r} is not supported, only {fixed[key]!r} is")
        if key not in known_keys and not key.startswith("_"):
            raise UserError(f'{where}: setting "{key}" is unknown{nearest(key, known_keys)}')


def _like(value, example, per_level=False):
    """Whether a setting has its example's type."""
    if isinstance(value, (list, tuple)) and (per_level or isinstance(example, list)):
        return bool(value) and all(_like(item, example[0] if isinstance(example, list) else example) for item in value)
    if isinstance(example, float):
        return type(value) in (int, float)
    return type(value) is type(example) or example is None and type(value) is int


def _one_number(value, key, where):
    """The value of a setting that is one number, or a list of equal numbers with one for each level."""
    if isinstance(value, (list, tuple)):
        if len(set(value)) != 1:
            raise UserError(f"{where}: {key} {value} is not supported, only one number for all levels is")
        return value[0]
    return value


def _attention_levels(types, plain, levels, where):
    """The levels with attention, from full size downwards, by their block types."""
    if len(types) != levels:
        raise UserError(f"{where}: {len(types)} block types for {levels} levels")
    for name in types:
        if name not in (plain, "CrossAttn" + plain):
            raise UserError(f'{where}: block type "{name}" is not supported, only {plain} and CrossAttn{plain} are')
    return tuple(level for level, name in enumerate(types) if name.startswith("CrossAttn"))
