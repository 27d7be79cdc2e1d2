"""Time and memory of Stable Diffusion, beside diffusers and transformers where they are installed.

    pip install diffusers==0.42.1 transformers==5.23.0
    python tests/benchmarks/bench_stable_diffusion.py --what step [autoencoder text tiny load bf16] [--folder FOLDER]

step         one U-Net step in float32 at 16x16 batch 2, 32x32 batch 1, 64x64 batch 2: time, peak memory, share of peak
autoencoder  decoding and encoding a picture of 512x512
text         CLIP's states of two prompts
tiny         a whole run of 50 DDIM steps of a tiny model, and what of it is spent outside the U-Net
load         from files to the end of the first step, less a second one, beside plainly reading the files; memory
bf16         the U-Net step in bfloat16 beside both float32 and diffusers' bfloat16, on CPUs that have it

Models have random weights (a folder of 4.3 GB is made, or found in --folder). Both sides open the same files; steps
alternate strictly in one process after a warm-up of each, and ratios are medians over pairs. On nanodiff's side what is
made once a run (the text's keys and values, the time embedding) is made once. Peak memory is VmHWM of a process of its
own that imports both libraries, opens the model and takes two steps. Run it alone on the machine: the load average is
printed with every pair.
"""

import argparse
import contextlib
import importlib
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import timeit
import warnings

import numpy as np
import torch
import torch.nn.functional as F

os.environ.setdefault("HF_HUB_OFFLINE", "1")
try:
    import diffusers
    import transformers
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
except ImportError:
    diffusers = None

import nanodiff
from nanodiff import fast

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import tiny_sd  # noqa: E402

SIDES = ["diffusers", "nanodiff"] if diffusers else ["nanodiff"]
OPEN = contextlib.ExitStack()  # packed weights are held open, as a generation does
PROMPTS = ["a photo of a woven fabric, close-up, soft light", "blurry, low quality"]
SIZES = {"full": {"step": ["16x16x2", "32x32x1", "64x64x2"], "load": "16x16x2", "bf16": "64x64x2", "picture": 512},
         "tiny": {"step": ["8x8x2", "16x8x1"], "load": "8x8x2", "bf16": "8x8x2", "picture": 32}}


# --- models ----------------------------------------------------------------------------------------------------------

def make_folder(args):
    """A diffusers folder with random weights of the full-size model args.settings (SD15 or SD21), or of a tiny one."""
    if args.settings == "tiny":
        return tiny_sd.write_model("sd1", args.folder)
    from nanodiff.formats.compvis_names import names_in_file

    words, weights = tiny_sd.FULL_SIZE[args.settings], {part: {} for part in tiny_sd.WEIGHT_FILES}
    parts = {"unet": "unet", "autoencoder": "vae", "text_model": "text_encoder"}
    generator = torch.Generator().manual_seed(0)
    for network, layers in names_in_file(words, args.settings == "SD21").values():
        for name, shape in layers.items():
            value = torch.randn(shape, generator=generator)
            if len(shape) > 1:
                value *= 0.7 / math.sqrt(math.prod(shape[1:]))
            else:
                value = 0.1 * value + ("norm" in name and name.endswith("weight"))
            weights[parts[network]][("text_model." if network == "text_model" else "") + name] = value
    tiny_sd.write_folder(args.folder, words, weights, "!" if args.settings == "SD21" else "<|endoftext|>")


def network(who, part, folder, dtype="float32"):
    """One network, "unet", "vae" or "text_encoder", of one side; nanodiff always opens the whole folder."""
    if who == "nanodiff":
        names = {"unet": "unet", "vae": "autoencoder", "text_encoder": "text_model"}
        net = getattr(nanodiff.load(folder, dtype=dtype), names[part])
        OPEN.enter_context(fast.packed(net))
        return net
    kind = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL,
            "text_encoder": transformers.CLIPTextModel}[part]
    return kind.from_pretrained(folder, subfolder=part, torch_dtype=getattr(torch, dtype), local_files_only=True).eval()


def inputs(folder, size, dtype=torch.float32):
    """(x, context) for "HxWxBATCH"."""
    height, width, batch = map(int, size.split("x"))
    settings = json.loads((pathlib.Path(folder) / "unet" / "config.json").read_text())
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, settings["in_channels"], height, width, generator=generator)
    return x.to(dtype), torch.randn(batch, 77, settings["cross_attention_dim"], generator=generator).to(dtype)


def step_of(who, net, x, context):
    """A function that takes one step, with what a run makes once already made."""
    if who == "diffusers":
        t = torch.tensor(500)
        return lambda: net(x, t, encoder_hidden_states=context).sample
    network = fast.once_a_run(net, [500])
    return lambda: network(x, 500, context)


# --- measuring -------------------------------------------------------------------------------------------------------

def alternate(title, calls, pairs, warmup=1):
    """Run {who: function} in turn; print every pair, medians and ratios of the last to the others. {who: median}."""
    seconds, outs = {who: [] for who in calls}, {}
    for i in range(warmup + pairs):
        for who, call in calls.items():
            start = time.perf_counter()
            outs[who] = call()
            seconds[who].append(time.perf_counter() - start)
        line = ", ".join(f"{who} {s[-1]:.4f} s" for who, s in seconds.items())
        print(f"{title}: {'warm-up' if i < warmup else 'pair'} {i}: {line}; load {os.getloadavg()[0]:.2f}", flush=True)
    timed = {who: s[warmup:] for who, s in seconds.items()}
    print(f"{title}: medians: " + ", ".join(f"{who} {statistics.median(s):.4f} s" for who, s in timed.items()))
    *others, ours = calls
    for who in others:
        ratios = [a / b for a, b in zip(timed[ours], timed[who])]
        low, high = interval_of_median(ratios)
        error = (outs[ours].float() - outs[who].float()).abs().max() / outs[who].float().abs().max()
        print(f"{title}: time ratio {ours} / {who}: median {statistics.median(ratios):.3f} (95 % interval {low:.3f} to "
              f"{high:.3f}, {len(ratios)} pairs); outputs differ by {error:.1e} of the largest")
    return {who: statistics.median(s) for who, s in timed.items()}


def interval_of_median(values, draws=10000, level=0.95):
    """Bootstrap interval of the median."""
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(values, (draws, len(values))), axis=1)
    return np.quantile(medians, [(1 - level) / 2, (1 + level) / 2])


def best(call, repeats=5):
    """The shortest of some calls, in seconds."""
    return min(timeit.repeat(call, number=1, repeat=repeats))


def peaks(n):
    """GFLOP/s of a float32 matrix product [n, n] and of a 3x3 convolution over 320 channels, the best of some calls."""
    a = torch.rand(n, n)
    product = 2 * n**3 / best(lambda: a @ a) / 1e9
    x, weight = torch.rand(2, 320, 64, 64), torch.rand(320, 320, 3, 3)
    kinds = [torch.contiguous_format, torch.channels_last]
    seconds = min(best(lambda: F.conv2d(x.to(memory_format=kind), weight, padding=1)) for kind in kinds)
    return product, 2 * 2 * 64 * 64 * 320 * 320 * 9 / seconds / 1e9


def flop_of_step(folder, size):
    """Multiplications and additions of one plain step, counted apart, without running it."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    settings = json.loads((pathlib.Path(folder) / "unet" / "config.json").read_text())
    x, context = inputs(folder, size)
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        diffusers.UNet2DConditionModel.from_config(settings)(x.to("meta"), torch.tensor(500), context.to("meta"))
    return counter.get_total_flops()


def status(key):
    """A size from /proc/self/status in MB, such as VmHWM (the peak) or RssAnon (memory that no file backs)."""
    for line in open("/proc/self/status"):
        if line.startswith(key + ":"):
            return int(line.split()[1]) / 1024


@contextlib.contextmanager
def anonymous_peak():
    """While open, a thread watches RssAnon; yields a list whose last entry is the peak above the start, in MB."""
    start, found, done = status("RssAnon"), [0.0], threading.Event()

    def watch():
        while not done.is_set():
            found.append(max(found[-1], status("RssAnon") - start))
            time.sleep(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


# --- in processes of their own ---------------------------------------------------------------------------------------

def in_child(args, task, who="nanodiff", size=""):
    command = [sys.executable, os.path.abspath(__file__), "--child", task, "--who", who, "--folder", str(args.folder),
               "--size", size, "--settings", args.settings, "--threads", str(args.threads)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def child_memory(args):
    """Peak memory of two steps, in MB: (peak, before the model was opened)."""
    before = status("VmHWM")
    step = step_of(args.who, network(args.who, "unet", args.folder), *inputs(args.folder, args.size))
    for _ in range(2):
        step()
    return status("VmHWM"), before


def child_load(args):
    """(seconds from files to the end of the first step less a second step, peak of anonymous memory in MB)."""
    x, context = inputs(args.folder, args.size)
    importlib.import_module({"nanodiff": "nanodiff.pipelines.stable_diffusion",  # what is timed is not the import
                             "diffusers": "diffusers.models.unets.unet_2d_condition"}[args.who])
    with anonymous_peak() as anonymous:
        start = time.perf_counter()
        net = network(args.who, "unet", args.folder)
        net(x, torch.tensor(500), context)
        first = time.perf_counter()
        net(x, torch.tensor(500), context)
        second = time.perf_counter()
    return (first - start) - (second - first), anonymous[-1]


def child_read(args):
    """Seconds to read the U-Net's file, and all files of weights, into memory."""
    files = [pathlib.Path(args.folder) / part / file for part, file in tiny_sd.WEIGHT_FILES.items()]
    seconds = []
    for file in files:
        start = time.perf_counter()
        file.read_bytes()
        seconds.append(time.perf_counter() - start)
    return seconds[0], sum(seconds)


# --- what can be measured --------------------------------------------------------------------------------------------

def bench_step(args):
    product, convolution = peaks(2048 if args.settings == "tiny" else 3072)
    print(f"peaks: matrix product {product:.0f} GFLOP/s, convolution {convolution:.0f} GFLOP/s")
    sizes = args.sizes or args.default["step"]
    memory = {size: {who: in_child(args, "memory", who, size) for who in SIDES} for size in sizes}
    nets = {who: network(who, "unet", args.folder) for who in SIDES}
    for size in sizes:
        title = f"U-Net step {size}"
        x, context = inputs(args.folder, size)
        seconds = alternate(title, {who: step_of(who, net, x, context) for who, net in nets.items()}, args.pairs)
        if diffusers:
            rate = flop_of_step(args.folder, size) / 1e9
            print(f"{title}: {rate:.4g} GFLOP if every product is made; " + ", ".join(
                f"{who} {rate / s:.0f} GFLOP/s, {rate / s / product:.2f} of the matrix product's peak, "
                f"{rate / s / convolution:.2f} of the convolution's" for who, s in seconds.items()))
        for who, (peak, before) in memory[size].items():
            print(f"{title}: peak memory {who}: {peak:.0f} MB, of which {before:.0f} MB before the model")
        if diffusers:
            (theirs, before), (ours, our_before) = memory[size]["diffusers"], memory[size]["nanodiff"]
            print(f"{title}: peak memory ratio {ours / theirs:.3f} (without what stood before: "
                  f"{(ours - our_before) / (theirs - before):.3f})")


def bench_autoencoder(args):
    nets, side = {who: network(who, "vae", args.folder) for who in SIDES}, args.default["picture"]
    image = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1
    z = nets["nanodiff"].encode(image).mean
    calls = {"diffusers": (lambda: nets["diffusers"].decode(z).sample,
                           lambda: nets["diffusers"].encode(image).latent_dist.mean),
             "nanodiff": (lambda: nets["nanodiff"].decode(z), lambda: nets["nanodiff"].encode(image).mean)}
    for i, title in enumerate((f"decode {side}x{side}", f"encode {side}x{side}")):
        alternate(title, {who: calls[who][i] for who in SIDES}, args.pairs)


def bench_text(args):
    ids = nanodiff.load(args.folder).tokenizer(PROMPTS)
    nets = {who: network(who, "text_encoder", args.folder) for who in SIDES}
    calls = {who: lambda who=who: nets[who](ids)[0] for who in SIDES}  # the states come first on either side
    alternate("text of two prompts", calls, args.pairs, warmup=2)


def watch(net):
    """A list that grows by the seconds of every call of a network."""
    seconds = []
    net.register_forward_pre_hook(lambda *_: seconds.append(-time.perf_counter()))
    net.register_forward_hook(lambda *_: seconds.append(seconds.pop() + time.perf_counter()))
    return seconds


def bench_tiny(args):
    with contextlib.ExitStack() as stack:
        folder = args.tiny_folder
        if not folder:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            tiny_sd.write_model("sd1", folder)
        sd = nanodiff.load(folder)
        shape = inputs(folder, "8x8x1")[0].shape
        x, side = torch.randn(shape, generator=torch.Generator().manual_seed(2)), 8 * sd.autoencoder.config.factor
        inside = {"nanodiff": watch(sd.unet)}
        runs = {"nanodiff": lambda steps: sd.generate(
            PROMPTS[0], negative=PROMPTS[1], steps=steps, sampler="ddim", latents=x, height=side, width=side,
            output="latents", progress=False)}
        if diffusers:
            pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, local_files_only=True, safety_checker=None)
            settings = json.loads((pathlib.Path(folder) / "scheduler" / "scheduler_config.json").read_text())
            pipe.scheduler = diffusers.DDIMScheduler.from_config(settings)
            pipe.set_progress_bar_config(disable=True)
            inside = {"diffusers": watch(pipe.unet), **inside}
            runs = {"diffusers": lambda steps: pipe(
                PROMPTS[0], negative_prompt=PROMPTS[1], num_inference_steps=steps, latents=x.clone(), height=side,
                width=side, output_type="latent").images, **runs}
        alternate("tiny model, 50 DDIM steps", {who: lambda run=run: run(50) for who, run in runs.items()}, args.pairs)
        for who, run in runs.items():
            outside = 1000 * outside_a_step(run, inside[who], args.pairs)
            print(f"tiny model: {who} {outside:.3f} ms a step outside the U-Net")


def outside_a_step(run, inside, repeats):
    """Seconds a step outside the U-Net, without what a run does once: from runs of 50 and of 10 steps."""
    found = []
    for _ in range(repeats):
        outside = {}
        for steps in (50, 10):
            inside.clear()
            outside[steps] = best(lambda: run(steps), 1) - sum(inside)
            if len(inside) != steps:
                print(f"the U-Net was seen {len(inside)} times in {steps} steps: what is outside cannot be told")
                return math.nan
        found.append((outside[50] - outside[10]) / 40)
    return statistics.median(found)


def bench_load(args):
    size = (args.sizes or [args.default["load"]])[0]
    bytes_of = {part: (pathlib.Path(args.folder) / part / file).stat().st_size
                for part, file in tiny_sd.WEIGHT_FILES.items()}
    unet, every = bytes_of["unet"] / 2**20, sum(bytes_of.values()) / 2**20
    in_child(args, "read")  # into the page cache
    rows = []
    for i in range(args.pairs):
        rows.append({"read": in_child(args, "read"), **{who: in_child(args, "load", who, size) for who in SIDES}})
        print("load: round {}: reading the U-Net's file {:.3f} s, all {:.3f} s; ".format(i, *rows[-1]["read"])
              + ", ".join(f"{who} {rows[-1][who][0]:.3f} s, {rows[-1][who][1]:.0f} MB" for who in SIDES)
              + f"; load {os.getloadavg()[0]:.2f}", flush=True)
    for who in SIDES:
        ratios = [statistics.median(row[who][0] / row["read"][i] for row in rows) for i in (0, 1)]
        anonymous = statistics.median(row[who][1] for row in rows)
        print(f"load: {who}, {size}: {ratios[0]:.2f} x reading the U-Net's file, {ratios[1]:.2f} x reading all; "
              f"anonymous memory {anonymous:.0f} MB at the peak = {anonymous / unet:.2f} x the U-Net's weights, "
              f"{anonymous / every:.2f} x all weights")


def bench_bf16(args):
    flags = next((set(line.split()) for line in open("/proc/cpuinfo") if line.startswith("flags")), set())
    fast = torch.ops.mkldnn._is_mkldnn_bf16_supported() and flags & {"avx512_bf16", "amx_bf16"}
    print(f"bf16: this CPU has {' and '.join(sorted(fast)) if fast else 'neither avx512_bf16 nor amx_bf16'}")
    if not fast and args.settings != "tiny":
        return print("bf16: not measured")
    size = (args.sizes or [args.default["bf16"]])[0]
    calls = {}
    for who, dtype in [(who, dtype) for who in SIDES for dtype in ("float32", "bfloat16")]:
        net = network(who, "unet", args.folder, dtype)
        calls[f"{who} {dtype}"] = step_of(who, net, *inputs(args.folder, size, getattr(torch, dtype)))
    alternate(f"U-Net step {size}", calls, args.pairs)


BENCHES = {"step": bench_step, "autoencoder": bench_autoencoder, "text": bench_text, "tiny": bench_tiny,
           "load": bench_load, "bf16": bench_bf16}
CHILDREN = {"make": make_folder, "memory": child_memory, "load": child_load, "read": child_read}


def main():
    warnings.filterwarnings("ignore", category=FutureWarning)  # diffusers' remarks on small models
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--what", nargs="+", choices=BENCHES, default=list(BENCHES), help="what is measured")
    parser.add_argument("--folder", help="a diffusers folder; made if it is not there (default: a temporary one)")
    parser.add_argument("--tiny-folder", help="the tiny model of --what tiny (default: the tests' own)")
    parser.add_argument("--settings", choices=["SD15", "SD21", "tiny"], default="SD15", help="size of what is made")
    parser.add_argument("--sizes", nargs="+", help="latents as HEIGHTxWIDTHxBATCH (default: those named above)")
    parser.add_argument("--pairs", type=int, default=7, help="pairs that are timed")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads of both")
    parser.add_argument("--child", choices=CHILDREN, help=argparse.SUPPRESS)
    parser.add_argument("--who", help=argparse.SUPPRESS)
    parser.add_argument("--size", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.default = SIZES["tiny" if args.settings == "tiny" else "full"]
    with torch.no_grad(), contextlib.ExitStack() as stack:
        if args.child:
            return print(json.dumps(CHILDREN[args.child](args)))
        print(f"torch {torch.__version__}, diffusers {diffusers.__version__ if diffusers else 'not installed'}, "
              f"{args.threads} threads, {args.settings}; load average {os.getloadavg()[0]:.2f}", flush=True)
        args.folder = args.folder or stack.enter_context(tempfile.TemporaryDirectory())
        if set(args.what) != {"tiny"} and not os.path.isfile(os.path.join(args.folder, "model_index.json")):
            in_child(args, "make")  # in a child: a process keeps what it has once taken
        for what in args.what:
            BENCHES[what](args)


if __name__ == "__main__":
    main()
