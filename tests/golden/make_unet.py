"""Reference outputs of diffusers' UNet2DModel for tests/models/test_unet.py: writes unet.safetensors and unet.json.

    pip install diffusers==0.42.1 && python tests/golden/make_unet.py

The weights are drawn from a seeded NumPy generator, here and in the test alike, so that only inputs, outputs and
some gradients are stored. Everything is computed in float64 (diffusers' sinusoids are float32) and stored as float32.
"""

import json
import os

import numpy as np
import torch

HERE = os.path.dirname(os.path.abspath(__file__))

CONFIGS = {
    "ddpm": {  # the settings of google/ddpm-cifar10-32, narrow
        "in_channels": 3, "out_channels": 3, "block_out_channels": [16, 32, 32, 32], "layers_per_block": 2,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"], "norm_num_groups": 8,
        "norm_eps": 1e-6, "attention_head_dim": None, "freq_shift": 1, "flip_sin_to_cos": False,
        "downsample_padding": 0, "act_fn": "silu",
    },
    "heads": {  # the library's own defaults where they differ, several heads, classes
        "in_channels": 2, "out_channels": 4, "block_out_channels": [16, 24], "layers_per_block": 1,
        "down_block_types": ["AttnDownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "norm_num_groups": 4, "norm_eps": 1e-2, "attention_head_dim": 8, "freq_shift": 0, "flip_sin_to_cos": True,
        "downsample_padding": 1, "act_fn": "gelu", "center_input_sample": True, "num_class_embeds": 5,
    },
}
SIZES = {"ddpm": [(16, 16), (8, 24)], "heads": [(6, 10)]}
GRADIENTS = ["conv_in.weight", "time_embedding.linear_1.weight", "down_blocks.0.resnets.0.norm1.weight",
             "down_blocks.1.resnets.0.norm2.bias", "down_blocks.1.attentions.0.to_k.weight",
             "mid_block.attentions.0.group_norm.weight", "up_blocks.1.resnets.0.conv_shortcut.bias", "conv_out.bias"]
BLOCKS = ["time_embedding", "down_blocks.0.resnets.0", "down_blocks.0.downsamplers.0", "down_blocks.1.attentions.0",
          "mid_block", "up_blocks.0.upsamplers.0", "conv_norm_out"]


def draw_weights(shapes, seed):
    """{name: float64 array} for {name: shape}: far from every default, so that no detail can hide."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name in sorted(shapes):
        draw = rng.standard_normal(shapes[name])
        if len(shapes[name]) > 1:
            weights[name] = draw * np.sqrt(0.5 / np.prod(shapes[name][1:]))
        else:
            weights[name] = 0.2 * draw + ("norm" in name and name.endswith("weight"))
    return weights


def main():
    import diffusers
    from safetensors.torch import save_file

    store, info = {}, {"versions": {"torch": torch.__version__, "diffusers": diffusers.__version__,
                                    "numpy": np.__version__}, "configs": CONFIGS, "state_dict_shapes": {}, "cases": []}
    for seed, (name, config) in enumerate(CONFIGS.items()):
        net = diffusers.UNet2DModel(**config).double()
        shapes = {key: list(value.shape) for key, value in net.state_dict().items()}
        net.load_state_dict({k: torch.from_numpy(v) for k, v in draw_weights(shapes, seed).items()})
        info["state_dict_shapes"][name] = shapes
        rng = np.random.default_rng(100 + seed)
        for size in SIZES[name]:
            t = [0, 1, 500, 999]
            label = [0, 1, 4, 2] if "num_class_embeds" in config else None
            key = f"{name}_{size[0]}x{size[1]}"
            x = torch.from_numpy(rng.standard_normal((len(t), config["in_channels"], *size)).astype(np.float32))
            weight = torch.from_numpy(rng.standard_normal((len(t), config["out_channels"], *size)).astype(np.float32))
            inner = {}
            hooks = [net.get_submodule(block).register_forward_hook(
                lambda module, inputs, out, block=block: inner.__setitem__(block, out)) for block in BLOCKS]
            input = x.double().requires_grad_()
            labels = None if label is None else torch.tensor(label)
            y = net(input, torch.tensor(t), class_labels=labels).sample
            net.zero_grad()
            (y * weight).sum().backward()
            for hook in hooks:
                hook.remove()
            store |= {key + "/x": x, key + "/weight": weight, key + "/y": y, key + "/grad/x": input.grad}
            store |= {f"{key}/grad/{p}": net.get_parameter(p).grad for p in GRADIENTS}
            store |= {f"{key}/inner/{block}": value[:1] for block, value in inner.items()}
            info["cases"].append({"key": key, "config": name, "seed": seed, "t": t, "label": label})
    store = {k: v.detach().float().contiguous().clone() for k, v in store.items()}
    save_file(store, os.path.join(HERE, "unet.safetensors"))
    os.chmod(os.path.join(HERE, "unet.safetensors"), 0o644)
    with open(os.path.join(HERE, "unet.json"), "w") as file:
        json.dump(info, file, indent=1)
        file.write("\n")


if __name__ == "__main__":
    main()
