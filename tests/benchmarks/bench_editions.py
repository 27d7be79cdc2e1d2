"""How fast this checkout is beside another one, such as an earlier commit: what a change of the house costs.

    git worktree add ../before COMMIT
    python tests/benchmarks/bench_editions.py --old ../before [--pairs 9] [--only ddpm_step lora_step]

Two processes, one in each checkout, take turns in every case; nothing else should run. Printed is old / new, so that
1 is the same speed and more is faster: the median over pairs with its bootstrap interval; bar .97.

    ddpm_step     training step of the 35.7 M-parameter U-Net, 16 pictures of 32x32
    ddpm_sample   its forward pass without gradients, 16 pictures
    digits_step   training step of the U-Net that train_ddpm.py gives digits, 32 pictures
    sd_step       SD 1.5's U-Net on two latents of 32x32, as a sampling step sees it
    sd_decode     SD 1.5's decoder, one latent of 32x32
    clip          SD 1.5's text encoder, 8 texts
    lora_step     LoRA training step of SD 1.5, attention, rank 4, a latent of 32x32
    nano_sample   one picture of the model that ships, 20 steps
    nano_start    the same from the command to the file
    first_command 60 steps of `python train_lora.py`: training alone, as the run counts it
    import        `import nanodiff, nanodiff.pipelines.stable_diffusion` in a new process
    memory_ddpm   peak memory of a process that takes three ddpm_steps (old / new as well)
    memory_lora   the same of three lora_steps
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

BAR = 0.97
HELD = []


# --- in a worker: this file run with --worker, in the checkout that it measures --------------------------------------

def fast(net):
    """The network as that checkout trains and draws with it."""
    try:
        from nanodiff import fast
    except ImportError:  # the first edition's layers are fast by themselves
        return net
    return fast.speed_up(net)


def lora_room():
    try:
        from nanodiff.models import lora
    except ImportError:
        from nanodiff.finetune import lora
    return lora


def filled(make):
    """A network of make() with weights that depend on a seed alone."""
    import torch
    with torch.device("meta"):
        net = make()
    net = net.to_empty(device="cpu")
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.uniform_(-1, 1, generator=draw).mul_(1 / max(1, p[0].numel()) ** 0.5) if p.ndim > 1 else p.fill_(1.0)
    return net


def training_step(net, *inputs):
    import torch
    import torch.nn.functional as F
    optimiser = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], 1e-4, fused=True)
    target = torch.randn_like(inputs[0])

    def step():
        F.mse_loss(net(*inputs), target).backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    return step


def ddpm_step():
    import torch
    from nanodiff.models.unet import UNet, UNetConfig
    net = fast(UNet(UNetConfig.cifar10())).train()
    return training_step(net, torch.randn(16, 3, 32, 32), torch.randint(0, 1000, (16,)))


def digits_step():
    import torch
    from nanodiff.models.unet import UNet, UNetConfig
    net = fast(UNet(UNetConfig(1, 1, [32, 64], 1, [1], heads=4, groups=16, patch=2, num_classes=10))).train()
    return training_step(net, torch.randn(32, 1, 28, 28), torch.randint(0, 1000, (32,)), torch.randint(0, 10, (32,)))


def without_gradients(net, *inputs):
    import torch

    @torch.no_grad()
    def call():
        net(*inputs)
    return call


def ddpm_sample():
    import torch
    from nanodiff.models.unet import UNet, UNetConfig
    net = fast(UNet(UNetConfig.cifar10())).eval().requires_grad_(False)
    return in_pack(net, without_gradients(net, torch.randn(16, 3, 32, 32), torch.randint(0, 1000, (16,))))


def in_pack(net, call):
    """call with the weights packed, as pipelines hold them over a generation."""
    try:
        from nanodiff import fast
    except ImportError:
        return call
    pack = fast.packed(net)
    pack.__enter__()
    HELD.append(pack)  # a context that nobody holds is closed
    return call


def sd_step():
    import torch
    from nanodiff.models.cond_unet import CondUNet, CondUNetConfig
    net = fast(filled(lambda: CondUNet(CondUNetConfig())).eval().requires_grad_(False))
    return in_pack(net, without_gradients(net, torch.randn(2, 4, 32, 32), torch.tensor([500, 500]), torch.randn(2, 77, 768)))


def sd_decode():
    import torch
    from nanodiff.models.kl_autoencoder import KLAutoencoder, KLAutoencoderConfig
    net = fast(filled(lambda: KLAutoencoder(KLAutoencoderConfig())).eval().requires_grad_(False))
    z = torch.randn(1, 4, 32, 32)

    @torch.no_grad()
    def call():
        net.decode(z)
    return in_pack(net, call)


def clip():
    import torch
    from nanodiff.models.clip_text import ClipText, ClipTextConfig
    net = fast(filled(lambda: ClipText(ClipTextConfig())).eval().requires_grad_(False))
    ids = torch.randint(0, 1000, (8, 77))
    ids[:, -1] = 49407
    return without_gradients(net, ids)


def lora_step():
    import torch
    from nanodiff.models.cond_unet import CondUNet, CondUNetConfig
    lora = lora_room()
    net = filled(lambda: CondUNet(CondUNetConfig())).requires_grad_(False)
    networks = {"unet": net}
    find = getattr(lora, "find_targets", None) or lora.targets  # its name in the first edition
    lora.add(networks, find(networks, ["attention"]), 4, 4, torch.Generator().manual_seed(0))
    net = fast(net).train()
    return training_step(net, torch.randn(1, 4, 32, 32), torch.tensor([500]), torch.randn(1, 77, 768))


def nano_sample():
    import nanodiff
    sd = nanodiff.load()
    return lambda: sd.generate("a red and blue striped texture", steps=20, guidance=3.0, seed=0, progress=False)


def nano_start():
    def call():
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([sys.executable, "-m", "nanodiff.sample", "--prompt", "a red and blue striped texture", "--steps",
                            "20", "--guidance", "3", "--out", folder + "/out"], check=True, capture_output=True)
    return call


def first_command():
    def call():
        with tempfile.TemporaryDirectory() as folder:
            picture_folder(folder + "/pictures")
            flags = {**FIRST, "data": folder + "/pictures", "out": folder + "/run", "steps": 60, "log_every": 20, "each": 1,
                     "sample_steps": 1, "preview_every": 1000, "checkpoint_every": 1000}
            words = [word for name, value in flags.items() for word in ([f"--{name}"] if value is True else
                                                                        [f"--{name}", str(value)])]
            subprocess.run([sys.executable, "train_lora.py", *words], check=True, capture_output=True)
            rows = [json.loads(line) for line in open(folder + "/run/log.jsonl")]
            rows = [row for row in rows if "loss" in row]
            return rows[-1]["seconds"] - rows[0]["seconds"]  # 40 steps; pictures and previews are left out
    return call


WORDS = "sf_dry,sf_compacted,sf_injected,sf_thickness,sf_warp,sf_weft"
FIRST = ({"recipe": "plain", "placeholder_token": WORDS, "with_prior_preservation": True, "class_data": "worlds",
          "num_class_images": 64, "class_batch": 2, "teacher_predictions": 2} if Path("nanodiff/fast").is_dir() else
         {"words": WORDS, "dreambooth": True, "class_pictures": "worlds", "class_count": 64, "class_batch": 2,
          "class_answers": 2})


def picture_folder(folder):
    """36 grey pictures of 64x64 with captions in which all WORDS occur."""
    from PIL import Image
    Path(folder).mkdir()
    draw = np.random.default_rng(0)
    for i in range(36):
        Image.fromarray(draw.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(f"{folder}/{i:02d}.png")
        state, axis = WORDS.split(",")[i % 3], WORDS.split(",")[3 + i % 2 + i % 4 // 3]
        Path(f"{folder}/{i:02d}.txt").write_text(f"{state} {axis}")


def imports():
    room = "nanodiff.pipelines.stable_diffusion" if Path("nanodiff/pipelines").is_dir() else "nanodiff.stable_diffusion"
    return lambda: subprocess.run([sys.executable, "-c", f"import nanodiff, {room}"], check=True)


def memory(make):
    """A call that gives the peak resident memory in MB of a new process that takes three steps of make()."""
    def call():
        code = (f"import sys; sys.path.insert(0, '.'); sys.argv = ['', '--old', '.'];\nimport runpy; names = runpy.run_path("
                f"{os.path.abspath(__file__)!r}, run_name='bench')\nstep = names[{make!r}]()\nfor _ in range(3): step()\n"
                "print(next(int(line.split()[1]) / 1024 for line in open('/proc/self/status') if line.startswith('VmHWM')))")
        return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    return call


CASES = {"ddpm_step": ddpm_step, "ddpm_sample": ddpm_sample, "digits_step": digits_step, "sd_step": sd_step,
         "sd_decode": sd_decode, "clip": clip, "lora_step": lora_step, "nano_sample": nano_sample, "nano_start": nano_start,
         "first_command": first_command, "import": imports, "memory_ddpm": lambda: memory("ddpm_step"),
         "memory_lora": lambda: memory("lora_step")}
PAIRS = {"memory_ddpm": 1, "memory_lora": 1}  # these hardly vary


def worker():
    """Reads the names of cases, then "go" for each measurement; answers with a number a line."""
    sys.path.insert(0, os.getcwd())
    call = None
    for line in sys.stdin:
        if line.strip() != "go":
            call = CASES[line.strip()]()
            if line.strip() not in ("first_command", "memory_ddpm", "memory_lora"):
                call()  # warm
            print("ready", flush=True)
            continue
        started = time.perf_counter()
        value = call()
        seconds = time.perf_counter() - started
        print(value if isinstance(value, float) else seconds, flush=True)


# --- the two workers in turn -----------------------------------------------------------------------------------------

def ask(process, word):
    process.stdin.write(word + "\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", required=True, help="the other checkout")
    parser.add_argument("--new", default=str(Path(__file__).resolve().parents[2]))
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    print(f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.2f}")
    for name in args.only:
        workers = [subprocess.Popen([sys.executable, os.path.abspath(__file__), "--old", ".", "--worker"], cwd=place, text=True,
                                    stdin=subprocess.PIPE, stdout=subprocess.PIPE) for place in (args.old, args.new)]
        for one in workers:
            assert ask(one, name) == "ready", f"{name} failed"
        pairs = [[float(ask(one, "go")) for one in (workers if i % 2 else workers[::-1])][::1 if i % 2 else -1]
                 for i in range(PAIRS.get(name, args.pairs))]
        for one in workers:
            one.stdin.close()
            one.wait()
        old, new = np.array(pairs).T
        ratios = old / new
        medians = np.median(np.random.default_rng(0).choice(ratios, (10_000, len(ratios))), axis=1)
        low, high = np.quantile(medians, [0.025, 0.975])
        print(f"{name:14} old {np.median(old):9.4f}  new {np.median(new):9.4f}  old / new {np.median(ratios):.3f} "
              f"({low:.3f} to {high:.3f}, {len(ratios)} pairs)  {'met' if np.median(ratios) >= BAR else 'NOT met'}", flush=True)


if __name__ == "__main__":
    worker() if "--worker" in sys.argv else main()
