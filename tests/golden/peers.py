"""diffusers, transformers and peft, quiet and offline, and the tiny models of tests/tiny_sd.py opened in them."""

import contextlib
import importlib
import os
import pathlib
import sys
import warnings

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1", TRANSFORMERS_VERBOSITY="error")
warnings.filterwarnings("ignore")

import diffusers  # noqa: E402
import numpy as np  # noqa: E402
import peft  # noqa: E402, F401
import torch  # noqa: E402
import transformers  # noqa: E402

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import tiny_sd  # noqa: E402

diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()
OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}  # of the autoencoder


def networks_of(settings):
    """The peers' networks of these settings, freshly initialised: {"unet", "vae", "text_encoder"}."""
    text = {k: v for k, v in settings["text_encoder"].items()
            if k not in ("architectures", "model_type", "torch_dtype", "transformers_version")}
    return {"unet": diffusers.UNet2DConditionModel.from_config(settings["unet"]),
            "vae": diffusers.AutoencoderKL.from_config(settings["vae"]),
            "text_encoder": transformers.CLIPTextModel(transformers.CLIPTextConfig(**text))}


def own_names(part, state):
    """A state dict in the names used throughout nanodiff: the text encoder's without "text_model."."""
    if part != "text_encoder":
        return dict(state)
    return {k.removeprefix("text_model."): v for k, v in state.items() if "position_ids" not in k}


def file_name(model, part, name):
    """The name of a weight in the model's file: old attention names in sd1's autoencoder, "text_model." in the text."""
    if part == "text_encoder":
        return "text_model." + name
    if part == "vae" and model != "sd2" and ".attentions." in name:
        for new, old in OLD_ATTENTION.items():
            name = name.replace(f".{new}.", f".{old}.")
    return name


def shapes_of(model):
    """{part: {name in the file: shape}}."""
    return {part: {file_name(model, part, k): list(v.shape) for k, v in own_names(part, net.state_dict()).items()}
            for part, net in networks_of(tiny_sd.SETTINGS[model]).items()}


def full_size():
    facts = {}
    for name, settings in tiny_sd.FULL_SIZE.items():
        with torch.device("meta"):
            nets = networks_of(settings)
        facts[name] = {"settings": settings}
        for part, net in nets.items():
            state = own_names(part, net.state_dict())
            facts[name][part] = {"parameters": sum(p.numel() for p in net.parameters()), "tensors": len(state),
                                 "sha256": tiny_sd.fingerprint({k: v.shape for k, v in state.items()})}
    return facts


def open_model(name, folder, shapes):
    """The pipeline that a user gets from the folder; raises when its weights are not the drawn ones."""
    tiny_sd.write_model(name, folder, shapes)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(
        folder, torch_dtype=torch.float32, local_files_only=True, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    for part, drawn in tiny_sd.draw_model(name, shapes).items():
        loaded = own_names(part, getattr(pipe, part).eval().state_dict())
        assert {file_name(name, part, k) for k in loaded} == drawn.keys()
        for key, value in loaded.items():
            assert value.dtype == torch.float32 and torch.equal(value, drawn[file_name(name, part, key)]), key
    assert len(pipe.tokenizer) == 49408 and pipe.tokenizer.pad_token == tiny_sd.PAD[name]
    return pipe


def ids_of(pipe, prompts):
    return pipe.tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids


def normal(rng, *shape):
    return torch.from_numpy(rng.standard_normal(shape).astype(np.float32))


@contextlib.contextmanager
def randn_from(module, noises):
    """While open, a diffusers module takes its noises from a list; yields the list of those that it took."""
    module, taken = importlib.import_module(module), []

    def next_noise(shape, *_, **__):
        taken.append(noises[len(taken)])
        assert taken[-1].shape == torch.Size(shape)
        return taken[-1]

    kept, module.randn_tensor = module.randn_tensor, next_noise
    try:
        yield taken
    finally:
        module.randn_tensor = kept


def components(pipe, **changes):
    return {**{k: getattr(pipe, k) for k in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")},
            "safety_checker": None, "feature_extractor": None, "requires_safety_checker": False, **changes}
