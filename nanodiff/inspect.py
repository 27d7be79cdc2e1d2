"""Say what a file or folder holds: a checkpoint, a LoRA, a textual inversion, a training run.

    python -m nanodiff.inspect model.safetensors lora.safetensors runs/ddpm-001

Only names, shapes and settings are read, and of a LoRA or an embedding the numbers; nothing in a file is executed.
"""

import json
import os
import re
from collections import Counter
from dataclasses import dataclass

from nanodiff.errors import UserError, check
from nanodiff.files import read_json
from nanodiff.flags import entry, parse
from nanodiff.formats import compvis_names, embedding_file, lora_file, single_file
from nanodiff.formats.weights import PICKLES, read_metadata, read_pickle, read_weights
from nanodiff.training.checkpoint import checkpoints

WEIGHT_FILES = ["diffusion_pytorch_model.safetensors", "model.safetensors", "diffusion_pytorch_model.fp16.safetensors",
                "model.fp16.safetensors", "diffusion_pytorch_model.bin", "pytorch_model.bin"]
FILES = ["pytorch_lora_weights.safetensors", "adapter_model.safetensors", "learned_embeds.safetensors",
         "pytorch_lora_weights.bin", "adapter_model.bin", "learned_embeds.bin"]
PARTS = {"unet": "U-Net", "vae": "autoencoder", "text_encoder": "text encoder"}
BASES = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "Stable Diffusion XL"}  # by context width
METADATA = re.compile(r"ss_(base_model_version|sd_model_name|output_name|network_(dim|alpha|module|args)|num_epochs"
                      r"|steps|num_train_images|v2|v_parameterization|learning_rate|training_comment)$"
                      r"|modelspec\.|word$")
# The layers that a LoRA changes: (pattern in their names with dots as underscores, what they are called together).
GROUPS = [
    (r"self_attn", "text encoder, attention"), (r"_mlp_", "text encoder, feed-forward"),
    (r"attn\d_", "attention"), (r"_ff_net_", "feed-forward"), (r"proj_(in|out)$", "in and out of the transformers"),
    (r"conv1$|conv2$|conv_shortcut$|time_emb_proj$|(in|out|emb)_layers_\d|skip_connection$", "ResNet convolutions"),
    (r"samplers_0_conv$|_op$|_[12]_conv$", "down- and upsampling"),
]


@dataclass
class Config:
    files: tuple = ()  # files and folders to look at


@entry
def main(argv=None):
    """Prints what the named files and folders hold."""
    config, _ = parse(Config, argv, __doc__)
    check(config.files, "no file was named; expected one or more files or folders, such as model.safetensors")
    for path in config.files:
        lines = describe(path)
        print(path)
        for label, text in lines:
            print(f"  {label:<30}  {text}")


def describe(path):
    """[(what, text)] on a file or folder, the first of them ("kind", ...).

    UserError in one sentence for what is missing, damaged, would run code, or is none of the kinds that we know.
    """
    path = os.fspath(path)
    check(os.path.exists(path), f"{path} does not exist; expected a file or a folder")
    if os.path.isdir(path):
        return describe_folder(path)
    check(path.endswith((".safetensors", *PICKLES)),
          f"{path} is no file of weights; expected one that ends in .safetensors or {', '.join(PICKLES)}")
    return describe_file(path)


# --- folders --------------------------------------------------------------------------------------------------------

def describe_folder(path):
    """What `describe` says of a folder."""
    def has(*names):
        return all(os.path.exists(os.path.join(path, name)) for name in names)

    settings = read_json(path, "config.json") if has("config.json") else {}
    if "script" in settings:
        return describe_run(path, settings)
    if has("run.pt"):
        return describe_checkpoint(path)
    if has("unet/config.json", "text_encoder/config.json"):
        return describe_pipeline(path)
    if has("unet/config.json"):
        return describe_ddpm(path, os.path.join(path, "unet"))
    if settings.get("_class_name") == "UNet2DModel":
        return describe_ddpm(path, path)
    if settings:
        kind = settings.get("_class_name") or (settings.get("architectures") or ["network"])[0]
        return [("kind", f"one network's folder, {kind}"), *network_lines("weights", path)]
    inside = [name for name in FILES if has(name)]
    check(inside, f"{path} is no folder that we know; expected a diffusers folder (model_index.json), a run of a train "
          "script, or one with a LoRA or an embedding in it")
    return [line for name in inside for line in describe_file(os.path.join(path, name))]


def describe_run(path, settings):
    """What a training run has done so far."""
    saved = checkpoints(path)
    lines = [("kind", f"training run of train_{settings['script']}.py"),
             ("checkpoints", f"{len(saved)}, last at step {int(saved[-1].name):,} of {settings.get('steps', 0):,}"
              if saved else "none yet")]
    model = os.path.join(path, "model")
    return lines + [("model/", text) if label == "kind" else (label, text)
                    for label, text in (describe_folder(model) if os.path.isdir(model) else [])]


def describe_checkpoint(path):
    """What one checkpoint of a training run holds."""
    state = read_pickle(os.path.join(path, "run.pt"))
    check(isinstance(state, dict) and {"step", "parts"} <= state.keys(), f"{path}/run.pt is not one of a training run; "
          "expected the step and the parts of a checkpoint")
    lines = [("kind", "training checkpoint"), ("step", f"{state['step']:,}")]
    for name in sorted(state["parts"]):
        file = os.path.join(path, f"{name}.pt")
        check(os.path.isfile(file), f"{path} lacks {name}.pt; expected a whole checkpoint")
        lines.append((f"part {name}", f"{os.path.getsize(file) / 1e6:,.1f} MB"))
    return lines


def describe_pipeline(path):
    """A diffusers folder of Stable Diffusion."""
    settings = single_file.read_settings(path)
    open_clip = single_file.has_open_clip(settings)
    lines = [("kind", f"{version(open_clip, settings['unet'].get('in_channels', 4))}, diffusers folder"),
             *settings_lines(settings)]
    for part, name in PARTS.items():
        lines += network_lines(name, os.path.join(path, part))
    return lines


def describe_ddpm(path, unet):
    """A folder with a U-Net that draws pictures without a text."""
    settings = read_json(unet, "config.json")
    lines = [("kind", "DDPM folder"), ("channels", "-".join(map(str, settings.get("block_out_channels", []))))]
    for name in ("scheduler/scheduler_config.json", "scheduler_config.json"):
        if os.path.isfile(os.path.join(path, name)):
            lines += scheduler_lines(read_json(path, name))
            break
    if os.path.isfile(os.path.join(path, "nanodiff.json")):
        ours = read_json(path, "nanodiff.json")
        lines += [("pictures", "x".join(map(str, ours.get("shape", [])))), ("data", ours.get("data") or "not said"),
                  ("classes", ", ".join(ours.get("classes", [])) or "none")]
    return lines + network_lines("U-Net", unet)


def network_lines(name, folder):
    """[(name, its size and types)] of the weights in a network's folder."""
    found = [file for file in WEIGHT_FILES if os.path.isfile(os.path.join(folder, file))]
    check(found, f"{folder} holds no weights; expected {WEIGHT_FILES[0]} or {WEIGHT_FILES[1]}")
    return [(name, size(read_weights(os.path.join(folder, found[0])).values()))]


# --- files ----------------------------------------------------------------------------------------------------------

def describe_file(path):
    """What `describe` says of a file of weights, by the names in it."""
    if path.endswith(PICKLES):
        try:
            return describe_embedding(path)
        except UserError:  # no embedding: a broken file or one that runs code is refused again just below
            pass
    held = compvis_names.normalise_names(read_weights(path), path)
    metadata = read_metadata(path) if path.endswith(".safetensors") else {}
    starts = Counter(key.split(".")[0] for key in held)
    if any(key.startswith("conditioner.embedders.1.") for key in held):
        lines = [("kind", "Stable Diffusion XL checkpoint, which is not supported"), ("weights", size(held.values()))]
    elif any(key.startswith(compvis_names.UNET) for key in held):
        lines = describe_single(path, held, metadata)
    elif any(re.search(r"lora|hada_|lokr_|\.oft_", key) for key in held):
        lines = describe_lora(path)
    elif {"time_embedding", "conv_in", "down_blocks"} <= starts.keys():
        kind = "Stable Diffusion's" if any(".attn2." in key for key in held) else "DDPM's"
        lines = [("kind", f"weights of a U-Net alone ({kind}), in diffusers' names"), ("weights", size(held.values()))]
    elif {"encoder", "decoder"} <= starts.keys():
        ldm = any(key.startswith("encoder.down.") for key in held)
        lines = [("kind", f"weights of an autoencoder alone, in {'CompVis' if ldm else 'diffusers'}' names"),
                 ("weights", size(held.values()))]
    elif any(key.endswith("embeddings.token_embedding.weight") for key in held):
        lines = [("kind", "weights of a text encoder alone, in transformers' names"), ("weights", size(held.values()))]
    else:
        try:
            lines = describe_embedding(path)
        except UserError:
            raise UserError(f"{path} holds {len(held)} tensors of no kind that we know, for example "
                            f'"{min(held, default="")}"; expected a Stable Diffusion checkpoint, a LoRA or a textual '
                            "inversion") from None
    shown = [(key, " ".join(text.split())[:100]) for key, text in sorted(metadata.items())
             if METADATA.match(key) and not text.startswith("data:")]
    return lines + shown


def describe_single(path, held, metadata):
    """A single file in CompVis' names, as far as its shapes and metadata go."""
    open_clip = any(key.startswith(compvis_names.OPEN_CLIP) for key in held)
    channels, context, width, layers = single_file.sizes(held)
    first = held.get(compvis_names.UNET + "input_blocks.0.0.weight")
    inputs = first.shape[1] if first is not None else 4
    lines = [("kind", f"{version(open_clip, inputs)}, single file in CompVis' names")]
    if "nanodiff" in metadata:
        lines += settings_lines(single_file.own_metadata(path, metadata)["settings"])
    else:
        said, where = single_file.read_prediction(path, held, metadata)
        said = f"{said} ({where})" if said else "epsilon (as all of its version)" if not open_clip else "not said"
        lines += [("channels", "-".join(map(str, channels))), ("context", f"{context} wide"),
                  ("text", f"{layers} layers, {width} wide"), ("predicts", said)]
    own = {"U-Net": compvis_names.UNET, "autoencoder": compvis_names.AUTOENCODER, "text encoder": compvis_names.TEXT}
    rest = dict(held)
    for name, start in own.items():
        part = [rest.pop(key) for key in held if key.startswith(start)]
        lines.append((name, size(part) if part else "missing"))
    twins = [rest.pop(key) for key in held if key.startswith("model_ema.")]
    if twins:
        lines.append(("averaged (EMA) twins", size(twins)))
    if rest:
        lines.append(("other keys", f"{len(rest)}: " + ", ".join(sorted(rest)[:3]) + ", ..." * (len(rest) > 3)))
    return lines


def describe_lora(path):
    """A LoRA: what it changes, by how much."""
    naming, found = lora_file.parse_lora(path)
    groups, widths = {}, set()
    for name, held in found.items():
        network, layer = lora_file.locate_layer(name)
        flat = ("." + layer).replace(".", "_")
        group = next((group for pattern, group in GROUPS if re.search(pattern, flat)), "other layers")
        groups.setdefault(group, []).append(change(held))
        if re.search(r"attn2_to_k$" if network == "unet" else r"self_attn_q_proj$", flat):
            widths.add(held["down"].shape[1])
    base = {base_of(width) for width in widths} or {"not to be told from these layers"}
    alphas = ["none (= rank)" if held["alpha"] is None else f"{held['alpha']:g}" for held in found.values()]
    lines = [("kind", f"LoRA, in {naming} names"), ("base model", " and ".join(sorted(base))),
             ("layers", str(len(found))), ("rank", counted(str(len(held["down"])) for held in found.values())),
             ("alpha", counted(alphas)),
             ("weights", size([held[which] for held in found.values() for which in ("down", "up")]))]
    for group, norms in sorted(groups.items(), key=lambda one: -len(one[1])):
        total = sum(norm**2 for norm in norms) ** 0.5
        lines.append((group, f"{len(norms)} layers, norm of the change {total:.4g}" + " (none at all)" * (total == 0)))
    return lines


def change(held):
    """Frobenius norm of alpha / rank * up @ down, without the product: trace((up' up) (down down'))."""
    up, down = held["up"].flatten(1).double(), held["down"].flatten(1).double()
    scale = 1.0 if held["alpha"] is None else held["alpha"] / len(down)
    return abs(scale) * float(((up.T @ up) * (down @ down.T)).sum().clamp(min=0)) ** 0.5


def describe_embedding(path):
    """A textual inversion: its words."""
    found = embedding_file.read_embeddings(path)
    width = next(iter(found.values())).shape[1]
    lines = [("kind", "textual inversion"), ("base model", base_of(width))]
    for word, vectors in found.items():
        norms = ", ".join(f"{norm:.3g}" for norm in vectors.norm(dim=1).tolist()[:8])
        lines.append((f'word "{word}"', f"{len(vectors)} x {width} numbers, norm {norms}"))
    return lines


# --- words ----------------------------------------------------------------------------------------------------------

def base_of(width):
    """The model whose text states are so wide."""
    return BASES.get(width, f"a model with texts {width} wide")


def version(open_clip, inputs):
    """What a Stable Diffusion model is called."""
    return f"Stable Diffusion {'2' if open_clip else '1'}.x" + " for inpainting" * (inputs == 9)


def settings_lines(settings):
    """Lines on the settings of a Stable Diffusion model."""
    unet, text = settings["unet"], settings["text_encoder"]
    heads = json.dumps(unet.get("attention_head_dim", 8))  # diffusers' key for the number of heads
    return [("channels", "-".join(map(str, unet.get("block_out_channels", []))) + f", heads {heads}"),
            ("context", f"{unet.get('cross_attention_dim')} wide"),
            ("text", f"{text.get('num_hidden_layers')} layers, {text.get('hidden_size')} wide"),
            *scheduler_lines(settings["scheduler"]),
            ("latent scaling factor", str(settings["vae"].get("scaling_factor", 0.18215)))]


def scheduler_lines(scheduler):
    """Lines on what a network predicts and on its noise schedule."""
    kind = scheduler.get("prediction_type", "epsilon") or "not said"
    named = f"{scheduler.get('beta_schedule', 'linear')} {scheduler.get('beta_start')} to {scheduler.get('beta_end')}"
    named = "betas of its own" if scheduler.get("trained_betas") is not None else named
    return [("predicts", kind), ("schedule", f"{scheduler.get('num_train_timesteps', 1000)} steps, {named}"
                                 + ", zero terminal SNR" * bool(scheduler.get("rescale_betas_zero_snr")))]


def size(tensors):
    """'859,520,964 parameters in 686 tensors, float16'."""
    tensors = list(tensors)
    types = counted(str(t.dtype).removeprefix("torch.") for t in tensors)
    return f"{sum(t.numel() for t in tensors):,} parameters in {len(tensors)} tensors, {types}"


def counted(words):
    """'4', or '4 (192), 2 (3)', the most frequent first, when they differ."""
    counts = Counter(words).most_common()
    return counts[0][0] if len(counts) == 1 else ", ".join(f"{word} ({n})" for word, n in counts)


if __name__ == "__main__":
    main()
