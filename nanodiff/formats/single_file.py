"""Single files of Stable Diffusion 1.x and 2.x, .safetensors or .ckpt, in CompVis' names: in and out.

Every key of a file is used or stands in LEFT_OUT; anything else is an error. What a file does not say (head counts,
group counts, tokenizer) is known for the full-size models, and comes from a diffusers folder for all others.
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
                                               usual_names)
from nanodiff.formats.diffusers_folder import schedule_from
from nanodiff.formats.stable_diffusion_folder import Checkpoint, read_settings
from nanodiff.formats.weights import read_metadata, read_weights, write_weights
from nanodiff.models.clip_text import Tokenizer

# What a file may hold beside the weights: keys that are read, and (pattern, what it is) of those that change nothing.
READ = ("betas", "alphas_cumprod", "scale_factor", "v_pred", "ztsnr")
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
    """A Checkpoint from a single .safetensors or .ckpt file in CompVis' names; tensors stay mapped, as they are.

    config   a diffusers folder that gives settings and tokenizer (its weights are not read); needed for sizes other
             than those of Stable Diffusion 1.x and 2.x, unless write_single_file wrote the file
    ema      take the U-Net's averaged (EMA) weights instead of its last ones
    What the network predicts is said by the folder, the metadata, a "v_pred" key or a .yaml beside the file; when an
    SD 2.x file says nothing, settings["scheduler"]["prediction_type"] is None. UserError when a weight is missing, left
    over or of the wrong shape, in the file's own names; for sizes that nobody explains; for a broken file.
    """
    path = str(path)
    held = usual_names(read_weights(path), path)
    for prefix in (UNET, AUTOENCODER, TEXT):
        if not any(key.startswith(prefix) for key in held):
            raise UserError(f'{path} is no checkpoint of Stable Diffusion 1.x or 2.x: no key begins with "{prefix}"'
                            + nearest(prefix, {key.split(".")[0] + "." for key in held}))
    metadata = read_metadata(path) if path.endswith(".safetensors") else {}
    open_clip = any(key.startswith(OPEN_CLIP) for key in held)
    settings = settings_of(path, held, metadata, config, open_clip)
    notes = take_prediction(settings, path, held, metadata, "epsilon" if config or not open_clip else None)
    notes += take_schedule(settings, path, held)
    notes += take_numbers(settings, held)
    weights, used = take_weights(path, held, settings, open_clip, ema)
    notes += left_out(path, held, used, settings, ema)
    return Checkpoint(settings, weights, tokenizer_of(path, metadata, config, open_clip), notes)


def take_weights(path, held, settings, open_clip, ema=False):
    """({network: {our name: tensor}}, the file's keys that are weights): all that the settings ask for, strictly."""
    names = names_in_file(settings, open_clip)
    place = {key: ema_name(key) if ema and key.startswith(UNET) else key for key in names}
    twins = [other in held for key, other in place.items() if other != key]
    if not all(twins):
        raise UserError(f"{path} holds averaged (EMA) twins of {sum(twins)} of the U-Net's {len(twins)} weights; "
                        "expected all of them, or ema=False")
    missing = sorted(set(place.values()) - held.keys())
    if missing:
        raise UserError(f'{path}: {len(missing)} weights are missing, for example "{missing[0]}"'
                        + nearest(missing[0], held.keys() - names.keys()))
    weights = {"unet": {}, "autoencoder": {}, "text_model": {}}
    for key, (network, ours) in names.items():
        tensor, shapes = held[place[key]], list(ours.values())
        whole = [sum(shape[0] for shape in shapes), *shapes[0][1:]]
        # a 1x1 convolution and a linear layer are the same map, and files hold either
        if list(tensor.shape[:2]) != whole[:2] or tensor.numel() != math.prod(whole) or not tensor.is_floating_point():
            raise UserError(f'{path}: "{place[key]}" has shape {list(tensor.shape)} and type '
                            f"{str(tensor.dtype).removeprefix('torch.')}, expected {whole} and a floating-point type")
        parts = tensor.reshape(whole).split([shape[0] for shape in shapes])  # views: nothing is copied
        weights[network].update(zip(ours, parts))
    return weights, names.keys() | set(place.values())


def left_out(path, held, used, settings, ema):
    """Notes on what the file holds beyond the weights that were used; UserError for keys that we do not know."""
    last = settings["text_encoder"].get("num_hidden_layers", 12)
    unused = (f"{OPEN_CLIP}transformer.resblocks.{last}.", f"{CLIP}encoder.layers.{last}.")
    counts, unknown = {}, []
    for key in held.keys() - used - set(READ):
        what = [what for pattern, what in LEFT_OUT if re.match(pattern, key)]
        if key.startswith(unused):  # SD 2 takes the states of the layer before the last
            what = ["weights of the last text layer, which is not used"]
        if what:
            counts[what[0]] = counts.get(what[0], 0) + 1
        else:
            unknown.append(key)
    if unknown:
        some = "; ".join(f'"{key}"{nearest(key, used)}' for key in sorted(unknown)[:3])
        raise UserError(f"{path} holds {len(unknown)} keys that no network has a place for: {some}")
    notes = [f"left out: {', '.join(f'{n} {what}' for what, n in sorted(counts.items()))}"] if counts else []
    if ema:
        notes.append("the U-Net's averaged (EMA) weights were taken")
    elif any(key.startswith("model_ema.diffusion") for key in held):
        notes.append("the U-Net's own weights were taken, not their averaged (EMA) twins; ema=True takes those")
    return notes


# --- settings -------------------------------------------------------------------------------------------------------

def sizes(held):
    """What the shapes in a single file say: U-Net channels, context width, and the text encoder's width and layers."""
    channels, n = [0], 1
    while True:
        block = held.get(f"{UNET}input_blocks.{n}.0.out_layers.3.weight")
        if block is not None:
            channels[-1] = block.shape[0]
        elif f"{UNET}input_blocks.{n}.0.op.weight" in held:
            channels.append(0)
        else:
            break
        n += 1
    context = [t.shape[1] for key, t in held.items() if key.startswith(UNET) and key.endswith("attn2.to_k.weight")]
    width = [t.shape[1] for key, t in held.items() if key.startswith(TEXT) and key.endswith("token_embedding.weight")]
    layers = {m[1] for key in held if (m := re.match(r"cond_stage_model\..*\.(?:resblocks|layers)\.(\d+)\.", key))}
    return channels, max(context, default=0), max(width, default=0), len(layers)


def settings_of(path, held, metadata, config, open_clip):
    """The settings: of a folder, of the file's own metadata, or of the full-size model whose shapes the file has."""
    if config:
        settings = read_settings(config)
    elif "nanodiff" in metadata:
        settings = own(path, metadata)["settings"]
    else:
        channels, context, width, layers = sizes(held)
        known = [(1024, 1024, 23), (1024, 1024, 24)] if open_clip else [(768, 768, 12)]
        if channels != [320, 640, 1280, 1280] or (context, width, layers) not in known:
            raise UserError(f"{path} has other sizes than Stable Diffusion 1.x or 2.x (U-Net channels {channels}, "
                            f"context {context}, {layers} text layers of width {width}) and does not say its head "
                            "counts, group counts and tokenizer: pass config=FOLDER, a diffusers folder of these sizes")
        settings = copy.deepcopy(SD21 if open_clip else SD15)
    if open_clip != has_open_clip(settings):
        raise UserError(f"{path} holds the text encoder of Stable Diffusion {1 + open_clip}.x, but its settings are of "
                        f"the other (hidden_act {settings['text_encoder'].get('hidden_act')}): pass its own folder")
    return settings


def tokenizer_of(path, metadata, config, open_clip):
    """The tokenizer: of a folder, or CLIP's own, with the words that the file's metadata adds to it."""
    if config and os.path.isdir(os.path.join(config, "tokenizer")):
        return Tokenizer.from_folder(os.path.join(config, "tokenizer"))
    if config or "nanodiff" not in metadata:
        return Tokenizer.shipped("!" if open_clip else "<|endoftext|>")
    words = own(path, metadata)["tokenizer"]
    tokenizer = Tokenizer.shipped(words["pad"])
    if described(tokenizer)["vocabulary"] != words["vocabulary"]:
        raise UserError(f"{path} has a vocabulary that is not CLIP's own and does not hold it: pass config=FOLDER, a "
                        "diffusers folder with its tokenizer")
    tokenizer.length = words["length"]
    for word, n in words["words"].items():
        tokenizer.add_word(word, n)
    return tokenizer


def own(path, metadata):
    """{"settings", "tokenizer"} from the metadata that write_single_file wrote; UserError when they are not so."""
    try:
        held = json.loads(metadata["nanodiff"])
        parts = ("unet", "vae", "text_encoder", "scheduler")
        good = all(isinstance(held["settings"][part], dict) for part in parts)
        good &= held["tokenizer"].keys() == {"pad", "length", "vocabulary", "words"}
        good &= isinstance(held["tokenizer"]["words"], dict)
    except (ValueError, KeyError, TypeError, AttributeError):
        good = False
    if not good:
        raise UserError(f'{path}: its metadata "nanodiff" cannot be read: pass config=FOLDER, a diffusers folder of '
                        "the same sizes")
    return held


def has_open_clip(settings):
    """Whether the text encoder is OpenCLIP's: only OpenAI's has the quick GELU, transformers' default."""
    return settings["text_encoder"].get("hidden_act", "quick_gelu") != "quick_gelu"


def take_numbers(settings, held):
    """Settings that a file says itself: the U-Net's input channels and the scaling factor. Returns notes."""
    notes = []
    inputs = held[UNET + "input_blocks.0.0.weight"].shape[1] if UNET + "input_blocks.0.0.weight" in held else 4
    if inputs != settings["unet"].get("in_channels", 4):
        settings["unet"]["in_channels"] = inputs
        notes.append(f"the U-Net takes {inputs} channels" + " (inpainting)" * (inputs == 9))
    if "scale_factor" in held:
        factor = float(held["scale_factor"])
        if not math.isclose(factor, settings["vae"].get("scaling_factor", 0.18215), rel_tol=1e-3):
            settings["vae"]["scaling_factor"] = factor
            notes.append(f"the scaling factor of the latents is the file's, {factor:.6g}")
    return notes


def prediction_said(path, held, metadata):
    """What a file says its network predicts, in diffusers' word, and where it says so; (None, "") when it does not."""
    word = metadata.get("modelspec.prediction_type")
    if word is not None:
        if word not in KINDS:
            raise UserError(f'{path}: modelspec.prediction_type "{word}" is unknown{nearest(word, KINDS)}')
        return KINDS[word], "the metadata"
    for name, word in (("v2-768-v", "v_prediction"), ("v2-512", "epsilon")):
        if name in metadata.get("modelspec.architecture", ""):
            return word, "the metadata"
    if "v_pred" in held:
        return "v_prediction", 'the key "v_pred"'
    if metadata.get("ss_v_parameterization") == "True":
        return "v_prediction", "the metadata"
    beside = os.path.splitext(path)[0] + ".yaml"
    if os.path.isfile(beside):
        with open(beside, encoding="utf-8", errors="replace") as file:
            text = file.read()
        if "ldm." in text or "LatentDiffusion" in text:
            word = re.search(r"^\s*parameterization:\s*[\"']?(\w+)", text, re.MULTILINE)
            return KINDS.get(word[1] if word else "eps"), beside  # the code that reads it takes "eps" for no word
    return None, ""


def take_prediction(settings, path, held, metadata, default):
    """Put what the network predicts into the settings unless they say it; default: when nothing does. Returns notes."""
    known = settings["scheduler"].get("prediction_type")
    said, where = prediction_said(path, held, metadata)
    if known and said and known != said:  # sizes may come from another model's folder, but this is the file's own matter
        set_prediction(settings, said)
        return [f"the network predicts {said}: {where} says so, against the settings, which say {known}"]
    set_prediction(settings, known or said or default)
    if settings["scheduler"]["prediction_type"] is None:
        return ["the file does not say whether its network predicts the noise or v"]
    return [f"the network predicts {said}: {where} says so"] * bool(said and not known)


def set_prediction(settings, word):
    """Set what the network predicts: "epsilon", "v_prediction" or None for "not known yet".

    The full-size SD 2 models that predict the noise are those for 512 pixels, the others are for 768.
    """
    settings["scheduler"]["prediction_type"] = word
    sd2 = settings["unet"].get("cross_attention_dim") == 1024 and settings["unet"].get("sample_size") == 96
    if word == "epsilon" and sd2:
        settings["unet"]["sample_size"], settings["vae"]["sample_size"] = 64, 512


def take_schedule(settings, path, held):
    """Put a file's own noise schedule into the settings where theirs is another. Returns notes.

    UserError when the file's two tables contradict each other.
    """
    scheduler = settings["scheduler"]
    if "ztsnr" in held:
        scheduler["rescale_betas_zero_snr"] = True
    tables = {key: held[key] for key in ("betas", "alphas_cumprod") if key in held}
    if not tables:
        return []
    coarse = max(torch.finfo(table.dtype).eps if table.is_floating_point() else 0 for table in tables.values())
    close = {"rtol": max(1e-4, 8 * coarse), "atol": 1e-6}  # some files hold the tables in half precision
    alpha_bar = tables.get("alphas_cumprod", torch.ones(0)).double()
    steps = 1 - alpha_bar / torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    try:
        file = Schedule.from_betas(tables.get("betas", steps))
    except ValueError as error:
        raise UserError(f"{path} holds no noise schedule that can be: {error}") from None
    if len(alpha_bar) not in (0, file.T) or not torch.allclose(alpha_bar, file.alpha_bar[:len(alpha_bar)], **close):
        raise UserError(f'{path}: "betas" and "alphas_cumprod" are not of one noise schedule')
    said = noise_schedule(scheduler)
    rescaled = [said.zero_terminal_snr()] if scheduler.get("rescale_betas_zero_snr") else []  # files hold either
    if any(one.T == file.T and torch.allclose(one.alpha_bar, file.alpha_bar, **close) for one in [said, *rescaled]):
        return []
    scheduler.update(trained_betas=file.beta.tolist(), num_train_timesteps=file.T)
    return [f"the noise schedule is the file's own: {file.T} steps, beta {file.beta[0]:.5g} to {file.beta[-1]:.5g}"]


def noise_schedule(scheduler):
    """The Schedule of a scheduler's settings, before any rescaling to zero terminal SNR."""
    return schedule_from({**scheduler, "prediction_type": "epsilon", "rescale_betas_zero_snr": False})[0]


# --- writing --------------------------------------------------------------------------------------------------------

def write_single_file(checkpoint, path, dtype=None):
    """Write a Checkpoint as one .safetensors file in CompVis' names, whole or not at all.

    dtype   of the weights, a torch.dtype or its name ("float16"); None keeps each as it is
    Settings and the tokenizer's words go into the metadata, so that reading it again needs no config. UserError for
    another ending, and for weights that are not those of the settings.
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
    wanted = {(network, key): shape for network, ours in names.values() for key, shape in ours.items()}
    given = {(network, key) for network in weights for key in weights[network]}
    for network, key in sorted(given ^ wanted.keys()):
        raise UserError(f"{path} cannot be written: the {network}'s weight \"{key}\" "
                        + ("is missing" if (network, key) in wanted else "has no place in a single file"))
    tensors = {}
    for name, (network, ours) in names.items():
        parts = [weights[network][key] for key in ours]
        for key, part in zip(ours, parts):
            if list(part.shape) != ours[key]:
                raise UserError(f'{path} cannot be written: "{key}" has shape {list(part.shape)}, expected {ours[key]}')
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        if ".attn_1." in name and tensor.ndim == 2:  # CompVis' autoencoder has convolutions there
            tensor = tensor[:, :, None, None]
        tensors[name] = tensor.to(dtype or tensor.dtype)
    kind = settings["scheduler"].get("prediction_type", "epsilon")
    metadata = {"nanodiff": json.dumps({"settings": settings, "tokenizer": described(checkpoint.tokenizer)}),
                "modelspec.sai_model_spec": "1.0.0"}
    if kind in ("epsilon", "v_prediction"):
        two = "stable-diffusion-v2-" + ("512" if kind == "epsilon" else "768-v")
        metadata |= {"modelspec.architecture": two if open_clip else "stable-diffusion-v1",
                     "modelspec.prediction_type": "epsilon" if kind == "epsilon" else "v"}
    write_weights(path, tensors | schedule_tables(noise_schedule(settings["scheduler"])), metadata)


def schedule_tables(schedule):
    """The tables of a noise schedule that CompVis' model keeps with its weights, float32 [T] each."""
    alpha_bar = schedule.alpha_bar.clamp(min=1e-20)  # no infinities at a terminal SNR of zero
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


def described(tokenizer):
    """What a file says of its tokenizer: padding, added words, a checksum of the vocabulary, which it does not hold."""
    tokens = "\n".join(sorted(tokenizer.vocab, key=tokenizer.vocab.get))
    return {"pad": tokenizer.pad, "length": tokenizer.length, "vocabulary": zlib.crc32(tokens.encode()),
            "words": {word: len(ids) for word, ids in sorted(tokenizer.words.items(), key=lambda one: one[1])}}
