"""Tiny Stable Diffusion models in diffusers' layout, and what diffusers and transformers computed from them.

Only inputs, outputs and the shapes of the weights are stored (golden/stable_diffusion.*, made by
golden/make_stable_diffusion.py). The weights are drawn from a seeded NumPy generator whenever a folder is written.
"sd1" has every habit of a Stable Diffusion 1 folder: convolutions around the transformers, one number of heads, quick
GELU, the autoencoder's attention under its old names, position_ids, no scaling factor. "sd2" has those of
Stable Diffusion 2: linear layers, heads per level, v-prediction, GELU, "!" as padding. Beyond NAMES there is
"sd1_inpaint", whose U-Net takes nine channels.
"""

import functools
import gzip
import hashlib
import json
import math
import pathlib

import numpy as np
import torch
from safetensors.torch import load_file, save_file

HERE = pathlib.Path(__file__).resolve().parent
MERGES = HERE.parent / "data" / "clip" / "bpe_simple_vocab_16e6.txt.gz"
NAMES = ("sd1", "sd2")
WEIGHT_FILES = {"unet": "diffusion_pytorch_model.safetensors", "vae": "diffusion_pytorch_model.safetensors",
                "text_encoder": "model.safetensors"}


# --- settings, in the words of diffusers' config.json ----------------------------------------------------------------

def _unet_settings(channels, **more):
    n = len(channels)
    return {
        "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.6.0", "act_fn": "silu",
        "block_out_channels": channels, "center_input_sample": False, "downsample_padding": 1,
        "down_block_types": ["CrossAttnDownBlock2D"] * (n - 1) + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * (n - 1), "flip_sin_to_cos": True, "freq_shift": 0,
        "in_channels": 4, "out_channels": 4, "mid_block_scale_factor": 1, "norm_eps": 1e-5, "sample_size": 8, **more}


def _vae_settings(channels, **more):
    return {
        "_class_name": "AutoencoderKL", "_diffusers_version": "0.6.0", "act_fn": "silu",
        "block_out_channels": channels, "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(channels), "in_channels": 3, "out_channels": 3,
        "latent_channels": 4, "norm_num_groups": 4, **more}


def _text_settings(**more):
    return {
        "architectures": ["CLIPTextModel"], "attention_dropout": 0.0, "bos_token_id": 0, "dropout": 0.0,
        "eos_token_id": 2, "initializer_factor": 1.0, "initializer_range": 0.02, "layer_norm_eps": 1e-5,
        "max_position_embeddings": 77, "model_type": "clip_text_model", "pad_token_id": 1, "torch_dtype": "float32",
        "transformers_version": "4.22.0.dev0", "vocab_size": 49408, **more}


def _scheduler_settings(kind, **more):
    return {
        "_class_name": kind, "_diffusers_version": "0.6.0", "beta_end": 0.012, "beta_schedule": "scaled_linear",
        "beta_start": 0.00085, "clip_sample": False, "num_train_timesteps": 1000, "set_alpha_to_one": False,
        "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None, **more}


SETTINGS = {
    "sd1": {
        "unet": _unet_settings([16, 32, 32], layers_per_block=1, attention_head_dim=4, norm_num_groups=8,
                               cross_attention_dim=24),
        "vae": _vae_settings([8, 12, 16], layers_per_block=1, sample_size=32),
        "text_encoder": _text_settings(hidden_act="quick_gelu", hidden_size=24, intermediate_size=96,
                                       num_attention_heads=4, num_hidden_layers=2, projection_dim=24),
        "scheduler": _scheduler_settings("PNDMScheduler"),
    },
    "sd2": {  # wherever SD 2 has a habit in common with SD 1, a number of its own
        "unet": _unet_settings([8, 16, 16, 24], layers_per_block=2, attention_head_dim=[2, 4, 2, 3], norm_num_groups=4,
                               cross_attention_dim=12, dual_cross_attention=False, num_class_embeds=None,
                               only_cross_attention=False, upcast_attention=True, use_linear_projection=True,
                               norm_eps=1e-3, _diffusers_version="0.10.0.dev0"),
        "vae": _vae_settings([8, 16], layers_per_block=2, sample_size=16, scaling_factor=0.13,
                             _diffusers_version="0.10.0.dev0"),
        "text_encoder": _text_settings(hidden_act="gelu", hidden_size=12, intermediate_size=40, num_attention_heads=3,
                                       num_hidden_layers=3, projection_dim=6, layer_norm_eps=1e-4),
        "scheduler": _scheduler_settings("DDIMScheduler", prediction_type="v_prediction", beta_start=0.001,
                                         beta_end=0.015, _diffusers_version="0.8.0"),
    },
}
SETTINGS["sd1_inpaint"] = {**SETTINGS["sd1"], "unet": {**SETTINGS["sd1"]["unet"], "in_channels": 9}}
PAD = {"sd1": "<|endoftext|>", "sd2": "!", "sd1_inpaint": "<|endoftext|>"}
FULL_SIZE = {
    "SD15": {
        "unet": _unet_settings([320, 640, 1280, 1280], layers_per_block=2, attention_head_dim=8, norm_num_groups=32,
                               cross_attention_dim=768, sample_size=64),
        "vae": _vae_settings([128, 256, 512, 512], layers_per_block=2, norm_num_groups=32, sample_size=512,
                             scaling_factor=0.18215),
        "text_encoder": _text_settings(hidden_act="quick_gelu", hidden_size=768, intermediate_size=3072,
                                       num_attention_heads=12, num_hidden_layers=12, projection_dim=768),
        "scheduler": _scheduler_settings("PNDMScheduler"),
    },
    "SD21": {
        "unet": _unet_settings([320, 640, 1280, 1280], layers_per_block=2, attention_head_dim=[5, 10, 20, 20],
                               norm_num_groups=32, cross_attention_dim=1024, dual_cross_attention=False,
                               num_class_embeds=None, only_cross_attention=False, upcast_attention=True,
                               use_linear_projection=True, sample_size=96),
        "vae": _vae_settings([128, 256, 512, 512], layers_per_block=2, norm_num_groups=32, sample_size=768,
                             scaling_factor=0.18215),
        "text_encoder": _text_settings(hidden_act="gelu", hidden_size=1024, intermediate_size=4096,
                                       num_attention_heads=16, num_hidden_layers=23, projection_dim=512),
        "scheduler": _scheduler_settings("DDIMScheduler", prediction_type="v_prediction"),
    },
}
CLASSES = {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
           "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}


# --- what was recorded -----------------------------------------------------------------------------------------------

@functools.cache
def golden():
    """{"<name>/<what>": tensor} of inputs and of what diffusers and transformers made of them, float32."""
    return load_file(HERE / "golden" / "stable_diffusion.safetensors")


@functools.cache
def info():
    """The JSON beside `golden()`: shapes of the weights, prompts, what was run how, facts of the full-size models."""
    return json.loads((HERE / "golden" / "stable_diffusion.json").read_text(encoding="utf-8"))


def fingerprint(shapes):
    """sha256 of the sorted lines "name [shape]" of {name: shape}."""
    lines = sorted(f"{name} {list(shape)}" for name, shape in shapes.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


# --- weights ---------------------------------------------------------------------------------------------------------

def draw_weights(shapes, seed):
    """{name: float32 tensor} for {name: shape}: far from every default, so that no detail can hide."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name in sorted(shapes):
        draw = rng.standard_normal(shapes[name])
        if "embedding.weight" in name:
            draw *= 0.5
        elif len(shapes[name]) > 1:
            gain = 4 if "attn2.to_out" in name else 0.6  # the prompt must count
            draw *= math.sqrt(gain / math.prod(shapes[name][1:]))
        else:
            draw = 0.2 * draw + ("norm" in name and name.endswith("weight"))
        weights[name] = torch.from_numpy(draw.astype(np.float32))
    return weights


def draw_model(name, shapes=None):
    """{"unet", "vae", "text_encoder": {name as in the file: float32 tensor}} of a tiny model."""
    shapes = shapes or info()["shapes"][name]
    first = 10 * list(SETTINGS).index(name)
    return {part: draw_weights(shapes[part], seed) for seed, part in enumerate(WEIGHT_FILES, first)}


def write_model(name, folder, shapes=None):
    """Write the diffusers folder of a tiny model: weights, settings and the full tokenizer, in well below a second."""
    weights = draw_model(name, shapes)
    if name != "sd2":
        weights["text_encoder"]["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    write_folder(folder, SETTINGS[name], weights, PAD[name])


def write_folder(folder, settings, weights, pad):
    """Write a diffusers folder from {part: settings}, {part: {name in the file: tensor}} and the padding token."""
    folder = pathlib.Path(folder)
    for part, file in WEIGHT_FILES.items():
        _write_json(folder / part / "config.json", settings[part])
        save_file(weights[part], folder / part / file, metadata={"format": "pt"})
    scheduler = settings["scheduler"]
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    _write_json(folder / "model_index.json", {
        "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.6.0", **CLASSES,
        "feature_extractor": [None, None], "requires_safety_checker": False, "safety_checker": [None, None],
        "scheduler": ["diffusers", scheduler["_class_name"]]})
    write_tokenizer(folder / "tokenizer", pad)


def _write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


# --- the tokenizer's four files --------------------------------------------------------------------------------------

@functools.cache
def tokenizer_files():
    """(vocab.json, merges.txt) as text: CLIP's 49408 tokens from OpenAI's list of merges."""
    merges = gzip.decompress(MERGES.read_bytes()).decode("utf-8").split("\n")[1:48895]
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = len(set(range(256)) - set(printable))  # bytes that cannot be printed stand as characters from 256 on
    letters = [chr(c) for c in [*printable, *range(256, 256 + others)]]
    tokens = letters + [letter + "</w>" for letter in letters] + [merge.replace(" ", "") for merge in merges]
    vocab = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return json.dumps(vocab, ensure_ascii=False), "#version: 0.2\n" + "\n".join(merges) + "\n"


def write_tokenizer(folder, pad):
    """Write vocab.json, merges.txt and the two files of special tokens."""
    def token(content):
        return {"content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}

    special = {"bos_token": token("<|startoftext|>"), "eos_token": token("<|endoftext|>"),
               "unk_token": token("<|endoftext|>"), "pad_token": pad}
    _write_json(folder / "special_tokens_map.json", special)
    _write_json(folder / "tokenizer_config.json", {
        **{key: {"__type": "AddedToken", **value} if isinstance(value, dict) else value
           for key, value in special.items()},
        "add_prefix_space": False, "do_lower_case": True, "errors": "replace", "model_max_length": 77,
        "tokenizer_class": "CLIPTokenizer"})
    for file, text in zip(("vocab.json", "merges.txt"), tokenizer_files()):
        (folder / file).write_text(text, encoding="utf-8")


# --- LoRA files for sd1 ----------------------------------------------------------------------------------------------

LORAS = ("peft", "kohya")
NO_ALPHA = "mid_block.attentions.0.proj_in"  # the one layer of the kohya file without an alpha: its alpha is its rank


def lora_parts(kind, shapes=None):
    """[(network, layer, down, up, alpha or None)] of a LoRA for sd1; network is "unet" or "text_encoder".

    peft: the attention of both networks, rank 4, alpha 3. kohya: all linear layers (rank 4, alpha 3 in the U-Net and
    1 in the text encoder) and convolutions (rank 2, alpha 1) but the U-Net's first and last and its time embedding.
    """
    shapes, rng, parts = shapes or info()["shapes"]["sd1"], np.random.default_rng(50 + LORAS.index(kind)), []
    for network in ("unet", "text_encoder"):
        for name, shape in sorted(shapes[network].items()):
            layer = name.removesuffix(".weight").removeprefix("text_model.")
            attention = ".attn" in name or "self_attn" in name
            if len(shape) < 2 or layer.startswith(("conv_", "time_embedding", "embeddings")) \
                    or kind == "peft" and not attention:
                continue
            rank, alpha = (2, 1.0) if len(shape) == 4 else (4, 3.0)
            if kind == "kohya" and network == "text_encoder":
                alpha = 1.0
            down = rng.standard_normal((rank, *shape[1:])) / math.sqrt(math.prod(shape[1:]))
            up = rng.standard_normal((shape[0], rank, *[1] * (len(shape) - 2))) * 0.4 / math.sqrt(rank)
            parts.append((network, layer, *(torch.from_numpy(a.astype(np.float32)) for a in (down, up)),
                          None if kind == "kohya" and layer == NO_ALPHA else alpha))
    return parts


def write_lora(kind, path, shapes=None):
    """Write a LoRA file: "peft" names with alpha in the metadata as diffusers saves it, or "kohya" names."""
    tensors, metadata = {}, {"format": "pt"}
    for network, layer, down, up, alpha in lora_parts(kind, shapes):
        layer = ("text_model." if network == "text_encoder" else "") + layer
        if kind == "peft":
            tensors |= {f"{network}.{layer}.lora_A.weight": down, f"{network}.{layer}.lora_B.weight": up}
        else:
            key = {"unet": "lora_unet_", "text_encoder": "lora_te_"}[network] + layer.replace(".", "_")
            tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
            if alpha is not None:
                tensors[key + ".alpha"] = torch.tensor(alpha)
    if kind == "peft":
        targets = {"unet": ["to_k", "to_out.0", "to_q", "to_v"],
                   "text_encoder": ["k_proj", "out_proj", "q_proj", "v_proj"]}
        metadata["lora_adapter_metadata"] = json.dumps({
            f"{network}.{key}": value for network, layers in targets.items()
            for key, value in {"lora_alpha": 3, "peft_type": "LORA", "r": 4, "target_modules": layers}.items()})
    save_file(tensors, path, metadata=metadata)


# --- textual inversion files for sd1 ---------------------------------------------------------------------------------

EMBEDDINGS = {"learned_embeds": ("<fibre>", 1), "a1111": ("sinuous", 2), "emb_params": ("<knit>", 3)}
EMBEDDING_FILES = {"learned_embeds": "learned_embeds.safetensors", "a1111": "sinuous.pt",
                   "emb_params": "knit.safetensors"}


def embedding(kind):
    """(word, vectors [n, 24]) of a textual inversion for sd1."""
    word, n = EMBEDDINGS[kind]
    draw = np.random.default_rng(60 + n).standard_normal((n, 24))
    return word, torch.from_numpy((0.5 * draw).astype(np.float32))


def write_embedding(kind, path):
    """Write a textual inversion file; the third kind does not say its word."""
    word, vectors = embedding(kind)
    if kind == "learned_embeds":
        save_file({word: vectors[0]}, path)
    elif kind == "emb_params":
        save_file({"emb_params": vectors}, path)
    else:
        torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, "name": word, "step": 500,
                    "sd_checkpoint": None, "sd_checkpoint_name": None}, path)
