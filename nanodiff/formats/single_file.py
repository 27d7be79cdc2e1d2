"""Reading and writing single files of Stable Diffusion 1.x and 2.x, .safetensors or .ckpt, in CompVis' names.

Every key of a file is used or matches LEFT_OUT; any other key is an error. Files lack head counts, group counts and the
tokenizer. Those of the full-size models are built in; for all other sizes they come from a diffusers folder.
"""

import copy
import json
import math
import os
import re
import zlib

import torch

from nanodiff.diffusion.schedule import Schedule
from nanodiff.errors import UserError, nearest
from nanodiff.formats.compvis_names import (AUTOENCODER, CLIP, OPEN_CLIP, TEXT, UNET, ema_name, names_in_file,
                                               normalise_names)
from nanodiff.formats.diffusers_folder import schedule_from
from nanodiff.formats.stable_diffusion_folder import Checkpoint, read_settings
from nanodiff.formats.weights import read_metadata, read_weights, write_weights
from nanodiff.models.clip_text import Tokenizer

# Keys beside the weights: those that are read, and (pattern, description) of those without effect.
READ_KEYS = ("betas", "alphas_cumprod", "scale_factor", "v_pred", "ztsnr")
LEFT_OUT = [
    (r"(first_stage_model\.)?model_ema\.", "averaged (EMA) weights"),
    (r"(alphas_cumprod_prev|(sqrt|log)_(one_minus_|recip_|recipm1_)?alphas_cumprod|posterior_\w+|lvlb_weights|logvar)$",
     "tables that follow from the schedule"),
    (r"first_stage_model\.loss\.", "parts of the autoencoder's training loss"),
    (r"cond_stage_model\..*position_ids$", "position_ids"),
    (r"embedding_manager\.", "parts of a textual inversion's training"),
    (r"denoiser\.(sigmas|log_sigmas)$", "tables that follow from the schedule"),
    (r"cond_stage_model\.(model\.|transformer\.(text_model\.)?)?(text_projection(\.weight)?|logit_scale|attn_mask)$",
     "parts of CLIP that the text's states do not pass"),
]
KINDS = {"epsilon": "epsilon", "eps": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction",
         "x0": "sample", "sample": "sample"}

# diffusers' settings of the full-size models
SD15 = {
    "unet": {
        "_class_name": "UNet2DConditionModel", "act_fn": "silu", "attention_head_dim": 8,
        "block_out_channels": [320, 640, 1280, 1280], "center_input_sample": False, "cross_attention_dim": 768,
        "down_block_types": 3 * ["CrossAttnDownBlock2D"] + ["DownBlock2D"], "downsample_padding": 1,
        "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 4, "layers_per_block": 2, "mid_block_scale_factor": 1,
        "norm_eps": 1e-5, "norm_num_groups": 32, "out_channels": 4, "sample_size": 64,
        "up_block_types": ["UpBlock2D"] + 3 * ["CrossAttnUpBlock2D"]},
    "vae": {
        "_class_name": "AutoencoderKL", "act_fn": "silu", "block_out_channels": [128, 256, 512, 512],
        "down_block_types": 4 * ["DownEncoderBlock2D"], "in_channels": 3, "latent_channels": 4, "layers_per_block": 2,
        "norm_num_groups": 32, "out_channels": 3, "sample_size": 512, "scaling_factor": 0.18215,
        "up_block_types": 4 * ["UpDecoderBlock2D"]},
    "text_encoder": {
        "architectures": ["CLIPTextModel"], "attention_dropout": 0.0, "bos_token_id": 0, "eos_token_id": 2,
        "hidden_act": "quick_gelu", "hidden_size": 768, "intermediate_size": 3072, "layer_norm_eps": 1e-5,
        "max_position_embeddings": 77, "model_type": "clip_text_model", "num_attention_heads": 12,
        "num_hidden_layers": 12, "pad_token_id": 1, "projection_dim": 768, "vocab_size": 49408},
    "scheduler": {
        "_class_name": "PNDMScheduler", "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085,
        "clip_sample": False, "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True,
        "steps_offset": 1, "trained_betas": None},
}
SD21 = {
    "unet": {**SD15["unet"], "attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "sample_size": 96,
             "use_linear_projection": True, "upcast_attention": True},
    "vae": {**SD15["vae"], "sample_size": 768},
    "text_encoder": {**SD15["text_encoder"], "hidden_act": "gelu", "hidden_size": 1024, "intermediate_size": 4096,
                     "num_attention_heads": 16, "num_hidden_layers": 23, "projection_dim": 512},
    "scheduler": {**SD15["scheduler"], "_class_name": "DDIMScheduler"},
}


# --- reading --------------------------------------------------------------------------------------------------------

def read_single_file(path, config=None, ema=False):
    """A Checkpoint from a single .safetensors or .ckpt file in CompVis' names; tensors stay memory-mapped.

    config   a diffusers folder with settings and tokenizer (its weights are not read); needed for sizes other than
             those of Stable Diffusion 1.x and 2.x, unless write_single_file wrote the file
    ema      take the U-Net's averaged (EMA) weights instead of its last ones
    The folder, the metadata, a "v_pred" key or a .yaml beside the file says what the network predicts. For an SD 2.x
    file without any of these settings["scheduler"]["prediction_type"] is None. UserError for a weight that is missing,
    left over or of the wrong shape, with the file's names; for unknown sizes; for a broken file.
    """
    path = str(path)
    tensors = normalise_names(read_weights(path), path)
    for prefix in (UNET, AUTOENCODER, TEXT):
        if not any(key.startswith(prefix) for key in tensors):
            raise UserError(f'{path} is no checkpoint of Stable Diffusion 1.x or 2.x: no key begins with "{prefix}"'
                            + nearest(prefix, {key.split(".")[0] + "." for key in tensors}))
    metadata = read_metadata(path) if path.endswith(".safetensors") else {}
    open_clip = any(key.startswith(OPEN_CLIP) for key in tensors)
    settings = find_settings(path, tensors, metadata, config, open_clip)
    notes = take_prediction(settings, path, tensors, metadata, "epsilon" if config or not open_clip else None)
    notes += take_schedule(settings, path, tensors)
    notes += take_numbers(settings, tensors)
    weights, used = take_weights(path, tensors, settings, open_clip, ema)
    notes += describe_left_out(path, tensors, used, settings, ema)
    return Checkpoint(settings, weights, load_tokenizer(path, metadata, config, open_clip), notes)


def take_weights(path, tensors, settings, open_clip, ema=False):
    """({network: {our name: tensor}}, keys of weights in the file): strictly all weights that the settings need."""
    names = names_in_file(settings, open_clip)
    file_key = {key: ema_name(key) if ema and key.startswith(UNET) else key for key in names}
    twins = [twin in tensors for key, twin in file_key.items() if twin != key]
    if not all(twins):
        raise UserError(f"{path} holds averaged (EMA) twins of {sum(twins)} of the U-Net's {len(twins)} weights; "
                        "expected all of them, or ema=False")
    missing = sorted(set(file_key.values()) - tensors.keys())
    if missing:
        raise UserError(f'{path}: {len(missing)} weights are missing, for example "{missing[0]}"'
                        + nearest(missing[0], tensors.keys() - names.keys()))
    weights = {"unet": {}, "autoencoder": {}, "text_model": {}}
    for key, (network, ours) in names.items():
        tensor, shapes = tensors[file_key[key]], list(ours.values())
        expected = [sum(shape[0] for shape in shapes), *shapes[0][1:]]
        # files hold a 1x1 convolution or a linear layer, which are the same map
        fits = list(tensor.shape[:2]) == expected[:2] and tensor.numel() == math.prod(expected)
        if not fits or not tensor.is_floating_point():
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise UserError(f'{path}: "{file_key[key]}" has shape {list(tensor.shape)} and type {dtype}, expected '
                            f"{expected} and a floating-point type")
        parts = tensor.reshape(expected).split([shape[0] for shape in shapes])  # views, no copies
        weights[network].update(zip(ours, parts))
    return weights, names.keys() | set(file_key.values())


def describe_left_out(path, tensors, used, settings, ema):
    """Notes on the keys of the file that were not used; UserError for unknown keys."""
    layers = settings["text_encoder"].get("num_hidden_layers", 12)
    unused = (f"{OPEN_CLIP}transformer.resblocks.{layers}.", f"{CLIP}encoder.layers.{layers}.")
    counts, unknown = {}, []
    for key in tensors.keys() - used - set(READ_KEYS):
        reasons = [reason for pattern, reason in LEFT_OUT if re.match(pattern, key)]
        if key.startswith(unused):  # SD 2 uses the states of the last layer but one
            reasons = ["weights of the last text layer, which is not used"]
        if reasons:
            counts[reasons[0]] = counts.get(reasons[0], 0) + 1
        else:
            unknown.append(key)
    if unknown:
        examples = "; ".join(f'"{key}"{nearest(key, used)}' for key in sorted(unknown)[:3])
        raise UserError(f"{path} holds {len(unknown)} keys that no network has a place for: {examples}")
    notes = [f"left out: {', '.join(f'{n} {reason}' for reason, n in sorted(counts.items()))}"] if counts else []
    if ema:
        notes.append("the U-Net's averaged (EMA) weights were taken")
    elif any(key.startswith("model_ema.diffusion") for key in tensors):
        notes.append("the U-Net's own weights were taken, not their averaged (EMA) twins; ema=True takes those")
    return notes


# --- settings -------------------------------------------------------------------------------------------------------

def sizes(tensors):
    """(U-Net channels, context width, text width, text layers) from the shapes in a single file."""
    channels, n = [0], 1
    while True:
        block = tensors.get(f"{UNET}input_blocks.{n}.0.out_layers.3.weight")
        if block is not None:
            channels[-1] = block.shape[0]
        elif f"{UNET}input_blocks.{n}.0.op.weight" in tensors:
            channels.append(0)
        else:
            break
        n += 1
    context = [t.shape[1] for key, t in tensors.items() if key.startswith(UNET) and key.endswith("attn2.to_k.weight")]
    width = [t.shape[1] for key, t in tensors.items()
             if key.startswith(TEXT) and key.endswith("token_embedding.weight")]
    layers = {m[1] for key in tensors if (m := re.match(r"cond_stage_model\..*\.(?:resblocks|layers)\.(\d+)\.", key))}
    return channels, max(context, default=0), max(width, default=0), len(layers)


def find_settings(path, tensors, metadata, config, open_clip):
    """The settings of a folder, of the file's own metadata, or of the full-size model with the shapes of the file."""
    if config:
        settings = read_settings(config)
    elif "nanodiff" in metadata:
        settings = own_metadata(path, metadata)["settings"]
    else:
        channels, context, width, layers = sizes(tensors)
        supported = [(1024, 1024, 23), (1024, 1024, 24)] if open_clip else [(768, 768, 12)]
        if channels != [320, 640, 1280, 1280] or (context, width, layers) not in supported:
            raise UserError(f"{path} has other sizes than Stable Diffusion 1.x or 2.x (U-Net channels {channels}, "
                            f"context {context}, {layers} text layers of width {width}) and does not say its head "
                            "counts, group counts and tokenizer: pass config=FOLDER, a diffusers folder of these sizes")
        settings = copy.deepcopy(SD21 if open_clip else SD15)
    if open_clip != has_open_clip(settings):
        raise UserError(f"{path} holds the text encoder of Stable Diffusion {1 + open_clip}.x, but its settings are of "
                        f"the other (hidden_act {settings['text_encoder'].get('hidden_act')}): pass its own folder")
    return settings


def load_tokenizer(path, metadata, config, open_clip):
    """The tokenizer of a folder, or CLIP's with the words of the file's metadata."""
    if config and os.path.isdir(os.path.join(config, "tokenizer")):
        return Tokenizer.from_folder(os.path.join(config, "tokenizer"))
    if config or "nanodiff" not in metadata:
        return Tokenizer.shipped("!" if open_clip else "<|endoftext|>")
    description = own_metadata(path, metadata)["tokenizer"]
    tokenizer = Tokenizer.shipped(description["pad"])
    if describe_tokenizer(tokenizer)["vocabulary"] != description["vocabulary"]:
        raise UserError(f"{path} has a vocabulary that is not CLIP's own and does not hold it: pass config=FOLDER, a "
                        "diffusers folder with its tokenizer")
    tokenizer.length = description["length"]
    for word, n in description["words"].items():
        tokenizer.add_word(word, n)
    return tokenizer


def own_metadata(path, metadata):
    """{"settings", "tokenizer"} from the metadata of write_single_file; UserError when it is not of this form."""
    try:
        content = json.loads(metadata["nanodiff"])
        parts = ("unet", "vae", "text_encoder", "scheduler")
        complete = all(isinstance(content["settings"][part], dict) for part in parts)
        complete &= content["tokenizer"].keys() == {"pad", "length", "vocabulary", "words"}
        complete &= isinstance(content["tokenizer"]["words"], dict)
    except (ValueError, KeyError, TypeError, AttributeError):
        complete = False
    if not complete:
        raise UserError(f'{path}: its metadata "nanodiff" cannot be read: pass config=FOLDER, a diffusers folder of '
                        "the same sizes")
    return content


def has_open_clip(settings):
    """Whether the text encoder is OpenCLIP's: OpenAI's has the quick GELU, transformers' default."""
    return settings["text_encoder"].get("hidden_act", "quick_gelu") != "quick_gelu"


def take_numbers(settings, tensors):
    """Notes, after copying the file's input channels and scaling factor into the settings."""
    notes = []
    inputs = tensors[UNET + "input_blocks.0.0.weight"].shape[1] if UNET + "input_blocks.0.0.weight" in tensors else 4
    if inputs != settings["unet"].get("in_channels", 4):
        settings["unet"]["in_channels"] = inputs
        notes.append(f"the U-Net takes {inputs} channels" + " (inpainting)" * (inputs == 9))
    if "scale_factor" in tensors:
        factor = float(tensors["scale_factor"])
        if not math.isclose(factor, settings["vae"].get("scaling_factor", 0.18215), rel_tol=1e-3):
            settings["vae"]["scaling_factor"] = factor
            notes.append(f"the scaling factor of the latents is the file's, {factor:.6g}")
    return notes


def read_prediction(path, tensors, metadata):
    """(prediction type in diffusers' word, its source) of a file; (None, "") when the file does not state it."""
    word = metadata.get("modelspec.prediction_type")
    if word is not None:
        if word not in KINDS:
            raise UserError(f'{path}: modelspec.prediction_type "{word}" is unknown{nearest(word, KINDS)}')
        return KINDS[word], "the metadata"
    for name, word in (("v2-768-v", "v_prediction"), ("v2-512", "epsilon")):
        if name in metadata.get("modelspec.architecture", ""):
            return word, "the metadata"
    if "v_pred" in tensors:
        return "v_prediction", 'the key "v_pred"'
    if metadata.get("ss_v_parameterization") == "True":
        return "v_prediction", "the metadata"
    yaml = os.path.splitext(path)[0] + ".yaml"
    if os.path.isfile(yaml):
        with open(yaml, encoding="utf-8", errors="replace") as file:
            text = file.read()
        if "ldm." in text or "LatentDiffusion" in text:
            word = re.search(r"^\s*parameterization:\s*[\"']?(\w+)", text, re.MULTILINE)
            return KINDS.get(word[1] if word else "eps"), yaml  # "eps" is the default of the code that reads it
    return None, ""


def take_prediction(settings, path, tensors, metadata, default):
    """Notes, after setting the prediction type from the file, else from the settings, else to `default`."""
    configured = settings["scheduler"].get("prediction_type")
    stated, where = read_prediction(path, tensors, metadata)
    if configured and stated and configured != stated:  # the settings may be another model's, lent for their sizes
        set_prediction(settings, stated)
        return [f"the network predicts {stated}: {where} says so, against the settings, which say {configured}"]
    set_prediction(settings, configured or stated or default)
    if settings["scheduler"]["prediction_type"] is None:
        return ["the file does not say whether its network predicts the noise or v"]
    return [f"the network predicts {stated}: {where} says so"] * bool(stated and not configured)


def set_prediction(settings, word):
    """Set the prediction type: "epsilon", "v_prediction" or None for "not known yet".

    Full-size SD 2 models that predict the noise are for 512 pixels, the others for 768.
    """
    settings["scheduler"]["prediction_type"] = word
    sd2 = settings["unet"].get("cross_attention_dim") == 1024 and settings["unet"].get("sample_size") == 96
    if word == "epsilon" and sd2:
        settings["unet"]["sample_size"], settings["vae"]["sample_size"] = 64, 512


def take_schedule(settings, path, tensors):
    """Notes, after copying the file's noise schedule into the settings when it differs from theirs.

    UserError when the file's two tables contradict each other.
    """
    scheduler = settings["scheduler"]
    if "ztsnr" in tensors:
        scheduler["rescale_betas_zero_snr"] = True
    tables = {key: tensors[key] for key in ("betas", "alphas_cumprod") if key in tensors}
    if not tables:
        return []
    eps = max(torch.finfo(table.dtype).eps if table.is_floating_point() else 0 for table in tables.values())
    tolerance = {"rtol": max(1e-4, 8 * eps), "atol": 1e-6}  # tables may be in half precision
    alpha_bar = tables.get("alphas_cumprod", torch.ones(0)).double()
    steps = 1 - alpha_bar / torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    try:
        stored = Schedule.from_betas(tables.get("betas", steps))
    except ValueError as error:
        raise UserError(f"{path} holds no noise schedule that can be: {error}") from None
    if len(alpha_bar) not in (0, stored.T) or not torch.allclose(
            alpha_bar, stored.alpha_bar[:len(alpha_bar)], **tolerance):
        raise UserError(f'{path}: "betas" and "alphas_cumprod" are not of one noise schedule')
    configured = noise_schedule(scheduler)
    # With zero terminal SNR a file holds the tables before or after rescaling
    rescaled = [configured.zero_terminal_snr()] if scheduler.get("rescale_betas_zero_snr") else []
    if any(schedule.T == stored.T and torch.allclose(schedule.alpha_bar, stored.alpha_bar, **tolerance)
           for schedule in [configured, *rescaled]):
        return []
    scheduler.update(trained_betas=stored.beta.tolist(), num_train_timesteps=stored.T)
    return [f"the noise schedule is the file's own: {stored.T} steps, "
            f"beta {stored.beta[0]:.5g} to {stored.beta[-1]:.5g}"]


def noise_schedule(scheduler):
    """The Schedule of a scheduler's settings, before any rescaling to zero terminal SNR."""
    return schedule_from({**scheduler, "prediction_type": "epsilon", "rescale_betas_zero_snr": False})[0]


# --- writing --------------------------------------------------------------------------------------------------------

def write_single_file(checkpoint, path, dtype=None):
    """Write a Checkpoint as one .safetensors file in CompVis' names, whole or not at all.

    dtype   of the weights, a torch.dtype or its name ("float16"); None keeps the dtype of each
    The metadata holds the settings and the tokenizer's words, so that reading the file needs no config. UserError for
    another ending, and for weights that do not match the settings.
    """
    path = str(path)
    if not path.endswith(".safetensors"):
        raise UserError(f"{path} does not end in .safetensors, the one kind of single file that is written")
    dtype = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise UserError(f'dtype "{dtype}" is unknown: expected float32, float16 or bfloat16')
    settings, weights = copy.deepcopy(checkpoint.settings), checkpoint.weights
    settings["text_encoder"]["vocab_size"] = len(weights["text_model"]["embeddings.token_embedding.weight"])
    open_clip = has_open_clip(settings)
    names = names_in_file(settings, open_clip)
    expected = {(network, key): shape for network, ours in names.values() for key, shape in ours.items()}
    given = {(network, key) for network in weights for key in weights[network]}
    for network, key in sorted(given ^ expected.keys()):
        raise UserError(f"{path} cannot be written: the {network}'s weight \"{key}\" "
                        + ("is missing" if (network, key) in expected else "has no place in a single file"))
    tensors = {}
    for name, (network, ours) in names.items():
        parts = [weights[network][key] for key in ours]
        for key, part in zip(ours, parts):
            if list(part.shape) != ours[key]:
                raise UserError(f'{path} cannot be written: "{key}" has shape {list(part.shape)}, expected {ours[key]}')
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        if ".attn_1." in name and tensor.ndim == 2:  # a convolution in CompVis' autoencoder
            tensor = tensor[:, :, None, None]
        tensors[name] = tensor.to(dtype or tensor.dtype)
    kind = settings["scheduler"].get("prediction_type", "epsilon")
    metadata = {"nanodiff": json.dumps({"settings": settings, "tokenizer": describe_tokenizer(checkpoint.tokenizer)}),
                "modelspec.sai_model_spec": "1.0.0"}
    if kind in ("epsilon", "v_prediction"):
        sd2_name = "stable-diffusion-v2-" + ("512" if kind == "epsilon" else "768-v")
        metadata |= {"modelspec.architecture": sd2_name if open_clip else "stable-diffusion-v1",
                     "modelspec.prediction_type": "epsilon" if kind == "epsilon" else "v"}
    write_weights(path, tensors | schedule_tables(noise_schedule(settings["scheduler"])), metadata)


def schedule_tables(schedule):
    """The tables of a noise schedule that CompVis' models store with their weights, float32 [T] each."""
    alpha_bar = schedule.alpha_bar.clamp(min=1e-20)  # finite at a terminal SNR of zero
    tables = {
        "betas": schedule.beta, "alphas_cumprod": schedule.alpha_bar,
        "alphas_cumprod_prev": torch.cat([torch.ones(1, dtype=torch.float64), schedule.alpha_bar[:-1]]),
        "sqrt_alphas_cumprod": schedule.alpha_bar.sqrt(), "sqrt_recip_alphas_cumprod": alpha_bar**-0.5,
        "sqrt_one_minus_alphas_cumprod": (1 - schedule.alpha_bar).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - schedule.alpha_bar).log(),
        "sqrt_recipm1_alphas_cumprod": (1 / alpha_bar - 1).sqrt(), "posterior_variance": schedule.posterior_variance,
        "posterior_log_variance_clipped": schedule.posterior_variance.clamp(min=1e-20).log(),
        "posterior_mean_coef1": schedule.posterior_mean_x0, "posterior_mean_coef2": schedule.posterior_mean_xt}
    return {name: table.float() for name, table in tables.items()}


def describe_tokenizer(tokenizer):
    """The tokenizer's part of the metadata: padding, added words, a checksum of the vocabulary."""
    tokens = "\n".join(sorted(tokenizer.vocab, key=tokenizer.vocab.get))
    return {"pad": tokenizer.pad, "length": tokenizer.length, "vocabulary": zlib.crc32(tokens.encode()),
            "words": {word: len(ids) for word, ids in sorted(tokenizer.words.items(), key=lambda item: item[1])}}
