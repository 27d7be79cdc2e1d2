"""Time and memory of LoRA training, beside diffusers and peft at the same settings, where they are installed.

    pip install diffusers==0.42.1 transformers==5.24.0 peft==0.21.2 accelerate
    python tests/benchmarks/bench_lora.py [--size SD15] [--what step epoch memory bf16] [--pairs 7] [--latent 32]

step     one training step: noise, forward, backward, clipping, AdamW; rank 4 on the attention, batch 1. Bar 0.72
epoch    what a picture costs. diffusers' train_text_to_image_lora.py encodes picture and caption in every step; ours
         encodes both once and then takes --epochs steps with each. Bar 0.5
memory   VmHWM after three steps, each side in a process of its own that imports and builds nothing else. Bar 0.95
bf16     the step with the frozen weights in bfloat16 (adapters float32) beside the peers' float32. Bar 0.45

--size tiny is tests/tiny_sd.py's sd1 with latents of 8x8; SD15 has random weights and latents of 32x32 (256x256).
Both sides hold the same weights and adapters and see the same latents, noise and time steps; their losses are compared.
Steps alternate strictly in one process after a warm-up; ratios are medians over pairs with a bootstrap interval. Run it
alone on the machine. --clock cpu times processor seconds of this process, for machines that are not idle (--threads 1).
"""

import argparse
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch
import torch.nn.functional as F

import nanodiff
from nanodiff import fast
from nanodiff.diffusion import Schedule, process
from nanodiff.models import lora
from nanodiff.models.clip_text import ClipText, ClipTextConfig
from nanodiff.models.cond_unet import CondUNet, CondUNetConfig
from nanodiff.models.kl_autoencoder import KLAutoencoder, KLAutoencoderConfig

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "golden")]
import tiny_sd  # noqa: E402

RANK, LR = 4, 1e-4
BARS = {"step": 0.72, "epoch": 0.5, "memory": 0.95, "bf16": 0.45}
SCHEDULE = Schedule.scaled_linear()


# --- models ----------------------------------------------------------------------------------------------------------

def fill(net, seed=0):
    """Random weights that depend on the names of the parameters and the seed alone; frozen."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(net.named_parameters()):
            if p.ndim > 1:
                p.uniform_(-1, 1, generator=draw).mul_(1 / math.sqrt(p[0].numel()))
            else:
                p.fill_(float("norm" in name and name.endswith("weight")))
    return net.requires_grad_(False)


def without_values(make):
    """What make() builds, with memory for its weights but nothing drawn."""
    with torch.device("meta"):
        net = make()
    return net.to_empty(device="cpu")


def our_networks(args, parts):
    """{"unet", "vae", "text_encoder"}: those of them that are asked for."""
    if args.size == "tiny":
        with tempfile.TemporaryDirectory() as folder:
            tiny_sd.write_model("sd1", folder)
            sd = nanodiff.load(folder)
        nets = {"unet": sd.unet, "vae": sd.autoencoder, "text_encoder": sd.text_model}
        return {part: nets[part].requires_grad_(False) for part in parts}
    make = {"unet": lambda: CondUNet(CondUNetConfig()), "vae": lambda: KLAutoencoder(KLAutoencoderConfig()),
            "text_encoder": lambda: ClipText(ClipTextConfig())}
    return {part: fast.speed_up(fill(without_values(make[part]))) for part in parts}


def their_networks(args, parts):
    """The same of diffusers and transformers."""
    from peers import diffusers, transformers

    if args.size == "tiny":
        with tempfile.TemporaryDirectory() as folder:
            tiny_sd.write_model("sd1", folder)
            pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, local_files_only=True, safety_checker=None)
        return {part: getattr(pipe, part).requires_grad_(False) for part in parts}
    settings = tiny_sd.FULL_SIZE[args.size]
    words = {k: v for k, v in settings["text_encoder"].items()
             if k not in ("architectures", "model_type", "torch_dtype", "transformers_version")}
    make = {"unet": lambda: without_values(lambda: diffusers.UNet2DConditionModel.from_config(settings["unet"])),
            "vae": lambda: without_values(lambda: diffusers.AutoencoderKL.from_config(settings["vae"])),
            "text_encoder": lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig(**words))}
    return {part: fill(make[part]()) for part in parts}


def our_adapters(unet):
    """Trainable adapters, up not 0 so that every gradient counts: {path: (down, up)}."""
    nets, draw = {"unet": unet}, torch.Generator().manual_seed(1)
    paths = lora.find_targets(nets, ["attention"])
    lora.add(nets, paths, RANK, RANK, draw)
    found = {}
    with torch.no_grad():
        for _, path, layer in lora.lora_layers(nets):
            adapter = layer.adapters[0]
            adapter.up.uniform_(-0.01, 0.01, generator=draw)
            found[path] = adapter.down, adapter.up
    fast.speed_up(unet)
    return found


def their_adapters(unet, values=None):
    """peft's adapters on the same layers, with the same values if there are some."""
    from peers import peft

    unet.add_adapter(peft.LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian",
                                     target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
    modules = dict(unet.named_modules())
    with torch.no_grad():
        for path, (down, up) in (values or {}).items():
            modules[path].lora_A["default"].weight.copy_(down)
            modules[path].lora_B["default"].weight.copy_(up)


# --- steps -----------------------------------------------------------------------------------------------------------

def stepper(call, unet, args, dtype=torch.float32):
    """A function of (latents, context, number) that takes one training step and returns its loss."""
    unet.train()
    trained = [p for p in unet.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, LR, fused=call is ours)  # as the two sides' scripts have it

    def step(latents, context, number):
        draw = torch.Generator().manual_seed(number)
        noise = torch.randn(latents.shape, generator=draw)
        t = torch.randint(1000, (len(latents),), generator=draw)
        x_t = process.q_sample(SCHEDULE, latents, t, noise)
        loss = F.mse_loss(call(unet, x_t.to(dtype), t, context.to(dtype)).float(), noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def ours(unet, x_t, t, context):
    return unet(x_t, t, context)


def theirs(unet, x_t, t, context):
    return unet(x_t, t, encoder_hidden_states=context).sample


def inputs(args, unet):
    """Latents and text states, drawn."""
    draw = torch.Generator().manual_seed(2)
    width = unet.config.context_channels if isinstance(unet, CondUNet) else unet.config.cross_attention_dim
    return torch.randn(args.batch, 4, args.latent, args.latent, generator=draw), torch.randn(
        args.batch, 77, width, generator=draw)


def both_steps(args, dtype=torch.float32):
    """(our step, their step or None) with equal weights and adapters, and what they take."""
    unet = our_networks(args, ["unet"])["unet"].to(dtype)
    values = our_adapters(unet)
    mine, given = stepper(ours, unet, args, dtype), inputs(args, unet)
    if not args.peers:
        return mine, None, given
    other = their_networks(args, ["unet"])["unet"]
    their_adapters(other, values)
    return mine, stepper(theirs, other, args), given


def seconds(args, call):
    """(seconds, what call() returned)"""
    clock = {"wall": time.perf_counter, "cpu": time.process_time}[args.clock]
    start = clock()
    result = call()
    return clock() - start, result


def compare(title, args, mine, other, bar):
    """Alternates two functions of a number, prints pairs and the ratio of ours to theirs; returns both medians."""
    pairs = []
    for i in range(-args.warmup, args.pairs):
        b, their_loss = seconds(args, lambda: other(i + 10)) if other else (math.nan, math.nan)
        a, our_loss = seconds(args, lambda: mine(i + 10))
        pairs += [(a, b)] if i >= 0 else []
        print(f"{title}: {'pair' if i >= 0 else 'warm-up'} {i}: nanodiff {a:.4f} s, diffusers {b:.4f} s; losses "
              f"{our_loss:.6f} {their_loss:.6f}; load {os.getloadavg()[0]:.2f}", flush=True)
    medians = [float(torch.tensor(column).median()) for column in zip(*pairs)]
    print(f"{title}: medians: nanodiff {medians[0]:.4f} s, diffusers {medians[1]:.4f} s")
    if other:
        report(title, [a / b for a, b in pairs], bar)
    return medians


def report(title, ratios, bar):
    medians = np.median(np.random.default_rng(0).choice(ratios, (10000, len(ratios))), axis=1)
    middle, (low, high) = np.median(ratios), np.quantile(medians, [0.025, 0.975])  # bootstrap interval of the median
    print(f"{title}: ratio nanodiff / diffusers: median {middle:.3f} (95 % interval {low:.3f} to {high:.3f}, "
          f"{len(ratios)} pairs); bar {bar}: {'met' if middle <= bar else 'NOT met'}", flush=True)


# --- what can be measured --------------------------------------------------------------------------------------------

def bench_step(args, dtype=torch.float32, what="step"):
    mine, other, given = both_steps(args, dtype)
    title = f"{what}, {args.size}, latents {args.latent}x{args.latent}, batch {args.batch}"
    compare(title, args, lambda i: mine(*given, i), other and (lambda i: other(*given, i)), BARS[what])


def bench_bf16(args):
    print(f"bf16: this CPU has {'' if fast.cpu_has_bfloat16() else 'no '}bfloat16 arithmetic")
    bench_step(args, torch.bfloat16, "bf16")


def bench_epoch(args):
    """Per picture: theirs encode + text + step every time; ours a step, and encode + text once in --epochs steps."""
    parts = ["unet", "vae", "text_encoder"]
    nets = our_networks(args, parts)
    values = our_adapters(nets["unet"])
    mine, (_, context) = stepper(ours, nets["unet"], args), inputs(args, nets["unet"])
    draw = torch.Generator().manual_seed(3)
    side = args.latent * nets["vae"].config.factor
    pictures = torch.rand(args.batch, 3, side, side, generator=draw) * 2 - 1
    ids = torch.randint(1000, (args.batch, 77), generator=draw)
    ids[:, -1] = 49407

    @torch.no_grad()
    def encode(i):
        z = nets["vae"].encode(pictures).sample(torch.Generator().manual_seed(i)) * nets["vae"].config.scaling_factor
        return z, nets["text_encoder"](ids)[0]

    latents, context = encode(0)
    once = [seconds(args, lambda i=i: encode(i))[0] for i in range(args.pairs)]
    once = float(torch.tensor(once).median())
    print(f"epoch: nanodiff encodes a picture and its caption once, in {once:.4f} s")
    if not args.peers:
        return
    others = their_networks(args, parts)
    their_adapters(others["unet"], values)
    step = stepper(theirs, others["unet"], args)

    def whole(i):
        with torch.no_grad():  # diffusers' script asks for no gradients here either: both networks are frozen
            z = others["vae"].encode(pictures).latent_dist.sample(torch.Generator().manual_seed(i))
            words = others["text_encoder"](ids, return_dict=False)[0]
        return step(z * nets["vae"].config.scaling_factor, words, i)

    title = f"epoch, {args.size}, pictures {side}x{side}, batch {args.batch}"
    a, b = compare(title, args, lambda i: mine(latents, context, i), whole, BARS["epoch"])
    for epochs in (1, args.epochs):
        print(f"{title}: with the encoding once, {epochs} epoch{'s' * (epochs > 1)}: ratio "
              f"{(a + once / epochs) / b:.3f}")


def bench_memory(args):
    found = {}
    for who in ["nanodiff", *["diffusers"] * args.peers]:
        command = [sys.executable, os.path.abspath(__file__), "--child", who, "--size", args.size, "--latent",
                   str(args.latent), "--batch", str(args.batch), "--threads", str(args.threads)]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found[who] = json.loads(out.splitlines()[-1])
        print(f"memory, {args.size}: {who} peak {found[who][0]:.0f} MB, {found[who][1]:.0f} MB before the model", flush=True)
    if args.peers:
        (a, a0), (b, b0) = found["nanodiff"], found["diffusers"]
        print(f"memory, {args.size}: ratio {a / b:.3f} (without what stood before: {(a - a0) / (b - b0):.3f}); bar "
              f"{BARS['memory']}: {'met' if a / b <= BARS['memory'] else 'NOT met'}")


def peak():
    """VmHWM of this process, in MB."""
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM:"))


def child_memory(args):
    """[peak of three steps, before the model], in MB."""
    if args.child == "diffusers":
        import peers  # noqa: F401
    before = peak()
    unet = (our_networks if args.child == "nanodiff" else their_networks)(args, ["unet"])["unet"]
    (our_adapters if args.child == "nanodiff" else their_adapters)(unet)
    step, given = stepper(ours if args.child == "nanodiff" else theirs, unet, args), inputs(args, unet)
    for i in range(3):
        step(*given, i)
    return peak(), before


BENCHES = {"step": bench_step, "epoch": bench_epoch, "memory": bench_memory, "bf16": bench_bf16}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--what", nargs="+", choices=BENCHES, default=list(BENCHES), help="what is measured")
    parser.add_argument("--size", choices=["tiny", "SD15"], default="SD15", help="of the model")
    parser.add_argument("--latent", type=int, help="side of the latents (default: 8 for tiny, else 32)")
    parser.add_argument("--batch", type=int, default=1, help="pictures a step")
    parser.add_argument("--pairs", type=int, default=7, help="pairs that are timed")
    parser.add_argument("--warmup", type=int, default=2, help="pairs before them")
    parser.add_argument("--epochs", type=int, default=10, help="steps with each picture, for --what epoch")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads of both")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="what is timed")
    parser.add_argument("--child", choices=["nanodiff", "diffusers"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.latent = args.latent or (8 if args.size == "tiny" else 32)
    torch.set_num_threads(args.threads)
    if args.child:
        return print(json.dumps(child_memory(args)))
    try:
        import peers
        versions = ", ".join(f"{m.__name__} {m.__version__}" for m in (peers.diffusers, peers.transformers, peers.peft))
    except ImportError:
        versions = ""
    args.peers = bool(versions)
    print(f"torch {torch.__version__}, {versions or 'no diffusers, transformers and peft'}; {args.threads} threads, "
          f"{args.clock} seconds; load average {os.getloadavg()[0]:.2f}", flush=True)
    for what in args.what:
        BENCHES[what](args)


if __name__ == "__main__":
    main()
