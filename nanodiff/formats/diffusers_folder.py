"""Model folders in the layout of the diffusers library: config.json beside safetensors weights.

Reading is strict: an unknown key or setting is an error. Nothing in a folder is executed. Report: section 3.2
(google/ddpm-cifar10-32 has this layout).
"""

import os
import re

import torch

from nanodiff.diffusion.schedule import Schedule
from nanodiff.errors import UserError, nearest
from nanodiff.files import read_json
from nanodiff.formats.weights import load_strictly, read_safetensors, write_folder
from nanodiff.models.unet import UNet, UNetConfig

WEIGHTS = "diffusion_pytorch_model.safetensors"

# Settings of a UNet2DModel that our config has under another name: (theirs, ours, their default).
UNET_NAMES = [
    ("block_out_channels", "channels", [224, 448, 672, 896]),
    ("layers_per_block", "blocks", 2),
    ("add_attention", "mid_attention", True),
    ("norm_num_groups", "groups", 32),
    ("attn_norm_num_groups", "mid_groups", None),
    ("norm_eps", "eps", 1e-5),
    ("act_fn", "activation", "silu"),
    ("dropout", "dropout", 0.0),
    ("time_embedding_dim", "time_channels", None),
    ("freq_shift", "freq_shift", 0),
    ("flip_sin_to_cos", "flip_sin_to_cos", True),
    ("downsample_padding", "downsample_padding", 1),
    ("center_input_sample", "center_input", False),
]
# Settings with a single supported value, their default; any other would be another network.
UNET_FIXED = {
    "time_embedding_type": "positional", "mid_block_type": "UNetMidBlock2D", "mid_block_scale_factor": 1,
    "downsample_type": "conv", "upsample_type": "conv", "resnet_time_scale_shift": "default", "class_embed_type": None,
}
# Settings that are read below or have no effect.
UNET_OTHER = ["in_channels", "out_channels", "down_block_types", "up_block_types", "attention_head_dim",
              "num_class_embeds", "patch", "no_class", "sample_size", "num_train_timesteps"]

# Settings of a scheduler that describe the training; all others belong to samplers.
SCHEDULES = {"linear": Schedule.linear, "scaled_linear": Schedule.scaled_linear, "squaredcos_cap_v2": Schedule.cosine}
KINDS = {"epsilon": "noise", "sample": "x0", "v_prediction": "v"}
SPACINGS = ("leading", "trailing", "linspace")


def load_unet(folder):
    """The UNet in a folder with a UNet2DModel's config.json and weights, in eval mode, float32.

    UserError if a file is missing or broken, if a setting needs another network than ours, or if a weight is missing,
    left over or of the wrong shape. Reads the folders of save_unet too.
    """
    config = unet_config_from(read_json(folder, "config.json"), os.path.join(folder, "config.json"))
    net = UNet(config)
    load_strictly(net, plain_names(read_safetensors(os.path.join(folder, WEIGHTS))), os.path.join(folder, WEIGHTS))
    return net.eval()


def save_unet(net, folder, sample_size=None):
    """Write a UNet as a UNet2DModel folder; it replaces the files of an older one when all are written.

    sample_size: [H, W] of the network's input, which diffusers' pipelines need.

    With patch > 1 the folder's in_channels and out_channels count the folded pixels, as the weights do: diffusers
    then opens a network over pixel_unshuffle(x, patch).
    """
    settings = {**unet_config_to(net.config), "sample_size": sample_size}
    write_folder(folder, {"config.json": settings}, {WEIGHTS: net.state_dict()})


def load_schedule(folder):
    """(Schedule, kind) of a folder's scheduler_config.json: the noise tables and "noise", "x0" or "v".

    The file may be in "scheduler/". UserError for an unknown schedule or prediction type. The samplers' own settings
    (spacing, clipping, ...) are not read here.
    """
    inner = os.path.join(folder, "scheduler")
    folder = inner if os.path.isdir(inner) else folder
    settings = read_json(folder, "scheduler_config.json")
    return schedule_from(settings, os.path.join(folder, "scheduler_config.json"))


def schedule_from(settings, where="scheduler_config.json"):
    """(Schedule, kind) of a scheduler's settings; UserError for an unknown schedule or prediction type."""
    kind = look_up(settings, "prediction_type", "epsilon", KINDS, where)
    betas, T = settings.get("trained_betas"), settings.get("num_train_timesteps", 1000)
    if "Flow" in str(settings.get("_class_name")) or settings.get("thresholding"):
        unsupported = settings["_class_name"] if "Flow" in str(settings.get("_class_name")) else "thresholding"
        raise UserError(f"{where}: {unsupported} is not supported; expected a scheduler of a diffusion model, without "
                        "thresholding")
    if betas is not None and len(betas) != settings.get("num_train_timesteps", len(betas)):
        raise UserError(f"{where}: {len(betas)} trained_betas for {T} num_train_timesteps; expected as many")
    constructor = None if betas is not None else look_up(settings, "beta_schedule", "linear", SCHEDULES, where)
    try:
        if constructor is None:
            schedule = Schedule.from_betas(betas)
        elif constructor == Schedule.cosine:  # takes no start and end
            schedule = constructor(T)
        else:
            schedule = constructor(T, settings.get("beta_start", 1e-4), settings.get("beta_end", 2e-2))
        return (schedule.zero_terminal_snr() if settings.get("rescale_betas_zero_snr") else schedule), kind
    except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: for a table of -1 steps
        raise UserError(f"{where} describes no noise schedule: {error}") from None


def sampler_options(settings, sampler, where="scheduler_config.json"):
    """{"spacing", "offset", "final_alpha"} for a sampler of `samplers.by_name`, from a scheduler's settings.

    Missing settings get the defaults of diffusers' class for that sampler. UserError for a bad spacing or offset.
    """
    spacing = settings.get("timestep_spacing") or ("leading" if sampler in ("ddpm", "ddim", "pndm") else "linspace")
    if spacing not in SPACINGS:
        raise UserError(f'{where}: timestep_spacing "{spacing}" is unknown; expected one of {", ".join(SPACINGS)}'
                        + nearest(spacing, SPACINGS))
    offset = settings.get("steps_offset", 0)
    if type(offset) is not int or offset < 0:
        raise UserError(f"{where}: steps_offset {offset!r} is not possible; expected a whole number from 0")
    options = {"spacing": spacing, "offset": offset}
    if sampler in ("ddim", "pndm"):
        options["final_alpha"] = "one" if settings.get("set_alpha_to_one", sampler == "ddim") else "first"
    return options


def save_schedule(schedule, kind, folder):
    """Write scheduler_config.json for a Schedule and its prediction kind ("noise", "x0" or "v").

    A table of one of diffusers' named schedules is written by name, any other as the list of its betas.
    """
    names = {ours: theirs for theirs, ours in KINDS.items()}
    if kind not in names:
        raise UserError(f'kind "{kind}" is unknown: expected one of {", ".join(names)}')
    settings = {"_class_name": "DDPMScheduler", "num_train_timesteps": schedule.T, "prediction_type": names[kind],
                "clip_sample": False, **schedule_settings(schedule)}
    write_folder(folder, {"scheduler_config.json": settings}, {})


def schedule_settings(schedule):
    """diffusers' settings that give a Schedule's tables."""
    first, last = float(schedule.beta[0]), float(schedule.beta[-1])
    for name, constructor in SCHEDULES.items():
        ends = {} if constructor == Schedule.cosine else {"beta_start": first, "beta_end": last}
        for rescale in (False, True):
            if rescale and constructor != Schedule.cosine:  # rescaling hides start and end: try the defaults
                default = constructor(schedule.T)
                ends = {"beta_start": float(default.beta[0]), "beta_end": float(default.beta[-1])}
            candidate = constructor(schedule.T, *ends.values())
            candidate = candidate.zero_terminal_snr() if rescale else candidate
            if torch.allclose(candidate.beta, schedule.beta, rtol=1e-12, atol=0):
                return {"beta_schedule": name, **ends, "rescale_betas_zero_snr": rescale}
    return {"trained_betas": schedule.beta.tolist(), "rescale_betas_zero_snr": False}


def look_up(settings, key, default, choices, where):
    """choices[settings[key]]; a UserError names the nearest choice."""
    value = settings.get(key, default)
    if value not in choices:
        raise UserError(f'{where}: {key} "{value}" is unknown; expected one of {", ".join(choices)}'
                        f"{nearest(value, choices)}")
    return choices[value]


def unet_config_from(settings, where="config.json"):
    """The UNetConfig for a UNet2DModel's settings (its config.json); UserError for an unsupported setting."""
    if settings.get("_class_name", "UNet2DModel") != "UNet2DModel":
        raise UserError(f'{where} describes a {settings["_class_name"]}, expected a UNet2DModel')
    known_keys = [theirs for theirs, _, _ in UNET_NAMES] + list(UNET_FIXED) + UNET_OTHER
    for key, value in settings.items():
        if key in UNET_FIXED and value != UNET_FIXED[key]:
            raise UserError(f"{where}: {key} {value!r} is not supported, only {UNET_FIXED[key]!r} is")
        if key not in known_keys and not key.startswith("_"):
            raise UserError(f'{where}: setting "{key}" is unknown{nearest(key, known_keys)}')

    fields = {ours: settings.get(theirs, default) for theirs, ours, default in UNET_NAMES}
    levels = len(fields["channels"])
    down = settings.get("down_block_types", ["DownBlock2D"] + 3 * ["AttnDownBlock2D"])
    up = settings.get("up_block_types", 3 * ["AttnUpBlock2D"] + ["UpBlock2D"])[::-1]  # from full size downwards
    fields["attention"] = attention_levels(down, levels, "DownBlock2D", where)
    fields["up_attention"] = attention_levels(up, levels, "UpBlock2D", where)
    if fields["up_attention"] == fields["attention"]:
        fields["up_attention"] = None

    # attention_head_dim is here the width of a head, unlike in other networks; null: one head.
    # A list holds one width per level: save_unet writes it for a fixed number of heads.
    head_dim = settings.get("attention_head_dim", 8)
    if isinstance(head_dim, list):
        fields["heads"] = fields["channels"][-1] // head_dim[-1]
        if head_dim != [width // fields["heads"] for width in fields["channels"]]:
            raise UserError(f"{where}: attention_head_dim {head_dim} is not one number of heads at every level")
    else:
        fields["heads"], fields["head_dim"] = 1, head_dim

    patch = fields["patch"] = settings.get("patch", 1)
    for key in ("in_channels", "out_channels"):
        folded = settings.get(key, 3)
        if folded % patch**2:
            raise UserError(f"{where}: {key} {folded} does not divide by patch * patch = {patch**2}")
        fields[key] = folded // patch**2
    rows = settings.get("num_class_embeds") or 0
    fields["no_class"] = settings.get("no_class", False) if rows else True
    fields["num_classes"] = rows - fields["no_class"] if rows else 0
    return UNetConfig(**fields)


def unet_config_to(config):
    """The settings of the UNet2DModel that equals our config; patch and no_class are keys of our own."""
    settings = {"_class_name": "UNet2DModel", **UNET_FIXED}
    for theirs, ours, _ in UNET_NAMES:
        value = getattr(config, ours)
        settings[theirs] = list(value) if isinstance(value, tuple) else value
    settings["in_channels"] = config.in_channels * config.patch**2
    settings["out_channels"] = config.out_channels * config.patch**2
    up_attention = config.attention if config.up_attention is None else config.up_attention
    levels = range(len(config.channels))
    settings["down_block_types"] = ["Attn" * (i in config.attention) + "DownBlock2D" for i in levels]
    settings["up_block_types"] = ["Attn" * (i in up_attention) + "UpBlock2D" for i in reversed(levels)]

    widths = set(config.attention_channels())
    if config.head_dim is not None or config.heads == 1:
        settings["attention_head_dim"] = config.head_dim
    elif len(widths) == 1:
        settings["attention_head_dim"] = widths.pop() // config.heads
    else:  # diffusers supports one head width for all levels and refuses a list
        settings["attention_head_dim"] = [width // config.heads for width in config.channels]

    if config.patch > 1:
        settings["patch"] = config.patch
    if config.num_classes:
        settings["num_class_embeds"] = config.num_classes + config.no_class
        if config.no_class:
            settings["no_class"] = True
    return settings


def attention_levels(types, levels, plain, where):
    """The levels with attention, from full size downwards, by their block types."""
    if len(types) != levels:
        raise UserError(f"{where}: {len(types)} block types for {levels} levels")
    for name in types:
        if name not in (plain, "Attn" + plain):
            raise UserError(f'{where}: block type "{name}" is not supported, only {plain} and Attn{plain} are')
    return tuple(level for level, name in enumerate(types) if name.startswith("Attn"))


def plain_names(weights):
    """The same weights under current names: no "_orig_mod." of torch.compile, no older attention names.

    Current names are unchanged, so applying it twice changes nothing.
    """
    older = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    renamed = {}
    for key, tensor in weights.items():
        new = key.replace("_orig_mod.", "")
        new = re.sub(r"(attentions\.\d+)\.(query|key|value|proj_attn)\.", lambda m: f"{m[1]}.{older[m[2]]}.", new)
        if new in renamed:
            raise UserError(f'the weights hold "{new}" twice, the second time as "{key}"')
        renamed[new] = tensor
    return renamed
