"""Whether two checkouts train the same weights: every script for 20 steps at one seed, compared bit for bit.

    python tests/benchmarks/editions.py --old FIRST_EDITION [--new CHECKOUT] [--only lora] [--cache FOLDER]

Each case is trained in both checkouts, each script in a process of its own with one thread. Compared are all tensors of
the last checkpoint (weights, EMA, optimisers), the losses of all steps, and the model files that a run leaves (LoRA,
embeddings, model folders); pictures are not, since a sampler may round otherwise. `NAME, resumed` is the same training
stopped after half of its steps. The last row is the outputs of data/nano-sd's networks and of both classifiers on fixed
inputs.

--only compares the cases whose name contains a text. --cache keeps the old checkout's tensors, so that it runs once.
Exit code 1 when anything differs, 0 when all is equal.
"""

import argparse
import collections
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

ROOT = pathlib.Path(__file__).resolve().parents[2]

# Flags by their names in the old and in the new checkout. A script's own line ("gan.loss") beats the others.
RENAMED = """
    accumulate        gradient_accumulation
    precision         mixed_precision
    kind              prediction
    gamma             snr_gamma
    offset            noise_offset
    places            targets
    base              base_dtype
    word              placeholder_token
    words             placeholder_token
    vectors           num_vectors
    initialiser       initializer_token
    prompt            instance_prompt
    dreambooth        with_prior_preservation
    class_pictures    class_data
    class_count       num_class_images
    class_answers     teacher_predictions
    prior_weight      prior_loss_weight
    checkpointing     gradient_checkpointing
    codebook_times    codebook_lr_scale
    textual_inversion.kind    learnable_property
    textual_inversion.prompt  validation_prompt
    lora.decay        weight_decay
    finetune.decay    weight_decay
    dreambooth.decay  weight_decay
    ldm.decay         weight_decay
    clip.decay        weight_decay
"""
VALUES = {("", "precision", "fp32"): "no"}  # {(script or "" for all, old flag, old value): new value}
ADDED = {name: {"with_prior_preservation": True}  # the class pictures implied it
         for name in ("dreambooth", "dreambooth, answers", "pivotal")}

# Where the classifiers' loaders are: in the new checkout, else in the old one.
LOADERS = {"worlds": ["nanodiff.classifiers.worlds:load_classifier", "nanodiff.metrics.features:load_reader"],
           "digits": ["nanodiff.classifiers.digits:load_classifier", "nanodiff.metrics.digits:load_digit_reader"]}

STEPS = 20
EVERY = dict(steps=STEPS, seed=3, device="cpu", workers=0, log_every=1, preview_every=1000, checkpoint_every=1000)
SMALL = dict(EVERY, data="{pictures}", batch=4)
MLP = dict(SMALL, widths="16,8", latent=3)
VQ = dict(channels=8, residual_layers=1, residual_channels=4, codes=12, code_channels=4, patience=2)
GAN = dict(EVERY, data="grid", channels="8,8", latent=2, batch=8, n_critic=2, lr=1e-3, judged=8)
DDPM = dict(SMALL, size=12, channels="8,8", blocks=1, attention="none", heads=1, T=20, lr=2e-3, warmup=2, dropout=0.1,
            kind="v", schedule="cosine", conditional=True, guidance=2, figures=False)
PLAIN = dict(DDPM, conditional=False, guidance=1)
LATENT = dict(EVERY, data="{colours}", size=32, crop=16, channels="8,8", latent_channels=2, batch=4, disc_start=0.3,
              adversarial_start=0.5, whole=0.2, disc_channels=8, warmup=2, codes=8)
LDM = dict(EVERY, autoencoder="{parts}/vae", text="{parts}", size=16, pictures=24, names="striped,dotted",
           channels="8,16", attention="1", head_width=8, text_width=16, text_layers=1, batch=4, warmup=1,
           sample_steps=1)
TEACH = dict(EVERY, model="{sd1}", data="zigzagged", pictures=6, batch=2, warmup=1, sample_steps=1, each=1,
             retention="two zebras")
V = dict(TEACH, model="{sd2}")
PRIOR = dict(class_prompt="a texture", class_count=4)
WORLDS = dict(class_pictures="worlds", class_count=12)

CASES = {  # name: the script's flags; a name is the script's, and behind a comma what is special
    "autoencoder": MLP,
    "autoencoder, convolutions": dict(MLP, net="conv", widths="4,6", ema=0.9, accumulate=2, clip=1.0, lr_end=0.1),
    "vae": dict(MLP, widths="16", importance=5, tsne=0),
    "vae, equation 1": dict(MLP, widths="16", importance=0, tsne=0, analytic=False, samples=3, kl_weight=0.5),
    "vae, convolutions": dict(MLP, net="conv", widths="4,6", importance=0, tsne=0, accumulate=2, kl_weight=0),
    "vqvae": dict(SMALL, size=12, **VQ, beta=0.5),
    "vqvae, ema codebook": dict(SMALL, size=12, **VQ, codebook="ema", ema=0.9, accumulate=2),
    "gan": dict(GAN, loss="non-saturating"),
    "gan, minimax": dict(GAN, loss="minimax", ema=0.9),
    "gan, wasserstein": dict(GAN, loss="wasserstein"),
    "gan, wasserstein-gp": dict(GAN, loss="wasserstein-gp"),
    "gan, pictures": dict(GAN, data="{pictures}", channels="4,8", latent=3, batch=4, loss="wasserstein-gp"),
    "vqgan": dict(EVERY, data="{kinds}", batch=4, **VQ, disc_channels=8, disc_start=0.3, adversarial_start=0.5,
                  perceptual=0.1, gpt_batch=4, gpt_steps=STEPS, gpt_width=8, gpt_layers=1, gpt_heads=2, warmup=2,
                  samples=2),
    "ddpm": dict(DDPM, accumulate=2),
    "ddpm, noise": dict(PLAIN, kind="noise", schedule="linear", offset=0.1, range="01"),
    "ddpm, x0 by the bound": dict(PLAIN, kind="x0", weight="elbo", schedule="scaled_linear", attention=6, heads=2),
    "ddpm, min-snr": dict(DDPM, weight="min-snr", patch=2, ema=0, range="standard"),
    "ddpm, noise by the bound": dict(PLAIN, kind="noise", weight="elbo"),
    "ddpm, bf16": dict(DDPM, precision="bf16", zero_snr=True),
    "kl_autoencoder": LATENT,
    "kl_autoencoder, codebook": dict(LATENT, regulariser="vq", accumulate=2, batch=2),
    "kl_autoencoder, no terms": dict(LATENT, perceptual=0, adversarial=0, equivariance=0, crop=0, kl_weight=0.1),
    "clip": dict(EVERY, pictures=24, variants=2, width=32, layers=1, heads=2, batch=8, warmup=1),
    "ldm": dict(LDM, accumulate=2),
    "ldm, noise": dict(LDM, kind="noise", optimiser="adamw", offset=0.1, gamma=5, schedule="scaled_linear", shift=1),
    "ldm, text from scratch": dict(LDM, text="scratch", caption_dropout=0.5),
    "ldm, pixels": dict(LDM, autoencoder="none", zero_snr=True),
    "ldm, init": dict(LDM, autoencoder="", text="", init="data/nano-sd", train_text=True, steps=4, batch=2, size=32),
    "finetune": dict(TEACH, gamma=5, offset=0.1),
    "finetune, text": dict(TEACH, train_text=True, accumulate=2, checkpointing=True),
    "finetune, zero snr": dict(V, zero_snr=True),
    "textual_inversion": dict(TEACH, vectors=2),
    "textual_inversion, object": dict(V, kind="object", base="bf16", initialiser="texture", gamma=5),
    "dreambooth": dict(TEACH, **PRIOR, prior_weight=0.7),
    "dreambooth, no prior": dict(V, train_text=True),
    "dreambooth, answers": dict(V, **WORLDS, prompt="a sks texture", class_answers=2, class_batch=1, train_text=True),
    "lora": TEACH,
    "lora, all": dict(V, places="attention,feedforward,projection,resnet,text", words="<new>", vectors=2,
                      dreambooth=True, prompt="a <new> texture", **WORLDS, class_answers=2, prior_weight=0.5, gamma=5),
    "lora, bf16": dict(TEACH, base="bf16", checkpointing=True, alpha=2, rank=3, decay=0.1, accumulate=2),
    "lora, prior": dict(TEACH, dreambooth=True, prompt="a sks texture", **WORLDS, class_batch=1, places="attention"),
    "pivotal": dict(TEACH, word_steps=STEPS // 2, vectors=2, **WORLDS),
    "pivotal, no prior": dict(V, word_steps=STEPS // 2, caption_dropout=0.2),
}
RESUMED = [name for name in CASES if "," not in name]  # every script once
FILES = ("*.safetensors", "*.pt", "*.pth")
NOT_COMPARED = ("before.safetensors", "previews", "checkpoints")  # drawn pictures; checkpoints are read by their parts

CHILD = """
import contextlib, importlib, json, sys, traceback
answers = {}
for name, case in json.load(open(sys.argv[1])).items():
    with open(case["log"], "w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            for words in case["calls"]:
                importlib.import_module(case["script"]).main(words)
            answers[name] = ""
        except BaseException:
            traceback.print_exc()
            log.flush()
            lines = open(case["log"]).read().split("Traceback (most")[0].splitlines() or [""]
            said = [line for line in lines if line.startswith("error: ")]
            answers[name] = said[-1] if said else traceback.format_exc().splitlines()[-1]
json.dump(answers, open(sys.argv[2], "w"))
"""

PARTS = """
import pathlib, sys
sys.path.insert(0, "tests")
import tiny_ldm
tiny_ldm.make_parts(pathlib.Path(sys.argv[1]))
"""

NETWORKS = """
import importlib, json, sys, torch
import nanodiff
loaders, out = json.loads(sys.argv[1]), {}
def loader(names):
    for name in names:
        module, function = name.split(":")
        try:
            return getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError):
            pass
    raise SystemExit("none of " + ", ".join(names) + " is there: edit LOADERS in tests/benchmarks/editions.py")
x = lambda *shape: torch.randn(*shape, generator=torch.Generator().manual_seed(7))
with torch.no_grad():
    sd = nanodiff.load()
    ids = sd.tokenizer(["sf_dry sf_warp", "a red star on blue", ""])
    out["text states"], out["text pooled"] = sd.text_model(ids)
    z = x(3, sd.unet.config.in_channels, 16, 16)
    out["U-Net"] = sd.unet(z, torch.tensor([0, 400, 999]), out["text states"])
    posterior = sd.autoencoder.encode(x(2, 3, 64, 64))
    out["autoencoder mean"], out["autoencoder logvar"] = posterior.mean, posterior.logvar
    out["autoencoder decoded"] = sd.autoencoder.decode(z)
    for name, answer in loader(loaders["worlds"])()(x(4, 3, 64, 64).tanh()).items():
        out["worlds' classifier, " + name] = answer
    out["digits' classifier"] = loader(loaders["digits"])()(x(4, 1, 28, 28).tanh())
torch.save(out, sys.argv[2])
"""


# --- data that both checkouts are shown -------------------------------------------------------------------------------

def make_data(folder, old):
    """{placeholder: folder} of tiny pictures and models, made once; the parts of a latent model by the old checkout."""
    places = {name: folder / name for name in ("pictures", "colours", "kinds", "sd1", "sd2", "parts")}
    if not (folder / "done").exists():
        rng = np.random.default_rng(0)
        for i in range(12):
            save_picture(places["pictures"] / "ab"[i % 2] / f"{i}.png", rng.integers(0, 256, (12, 12)))
            save_picture(places["kinds"] / "ab"[i % 2] / f"{i}.png", rng.integers(0, 256, (16, 16)))
            save_picture(places["colours"] / f"{i}.png", rng.integers(0, 256, (32, 32, 3)))
        sys.path.insert(0, str(ROOT / "tests"))
        import tiny_sd
        for name in ("sd1", "sd2"):
            tiny_sd.write_model(name, places[name])
        call(old, ["-c", PARTS, places["parts"]])
        (folder / "done").touch()
    return {f"{{{name}}}": str(place) for name, place in places.items()}


def save_picture(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def call(checkout, words):
    """Runs python in a checkout with one thread; a process that fails ends this one."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *map(str, words)], cwd=checkout, env=environment, capture_output=True,
                          text=True)
    if done.returncode:
        raise SystemExit(f"python in {checkout} failed: {done.stderr.strip()}")


# --- training ---------------------------------------------------------------------------------------------------------

def flags(script, case, places, new):
    """The command-line words of a case, in the names of the new checkout or of the old one."""
    table = dict(line.split() for line in RENAMED.strip().splitlines())
    words = []
    for name, value in CASES[case].items():
        for placeholder, place in places.items():
            value = value.replace(placeholder, place) if isinstance(value, str) else value
        if new:
            value = VALUES.get((script, name, value), VALUES.get(("", name, value), value))
            name = table.get(f"{script}.{name}", table.get(name, name))
        words.append(word(name, value))
    return words + [word(name, value) for name, value in ADDED.get(case, {}).items() if new]


def word(name, value):
    """A flag and its value as one word of a command line."""
    return f"--{name}={value}" if type(value) is not bool else f"--{name}" if value else f"--no-{name}"


def train(checkout, script, names, places, work, new):
    """{case: {name: tensor}} of one script's cases in a checkout; a sentence in place of the tensors if it failed."""
    cases = {}
    for name in names:
        out = work / name.replace(" ", "-").replace(",", "")
        plain, resumed = name.removesuffix(", resumed"), name.endswith(", resumed")
        words = [*flags(script, plain, places, new), f"--out={out}"]
        stop = STEPS + STEPS // 2 if resumed and script == "vqgan" else STEPS // 2  # in the middle of its second stage
        calls = [[*words, f"--stop={stop}"], [f"--resume={out}"]] if resumed else [words]
        cases[name] = {"script": f"train_{script}", "calls": calls, "log": f"{out}.log", "out": str(out)}
    request, answer = work / f"{script}.json", work / f"{script}.answer.json"
    request.write_text(json.dumps(cases))
    call(checkout, ["-c", CHILD, request, answer])
    failed = json.loads(answer.read_text())
    return {name: failed[name] or collect(pathlib.Path(case["out"])) for name, case in cases.items()}


def collect(out):
    """{name: tensor} of a run's last checkpoint, of its losses and of the model files in its folder."""
    found = {}
    for log in sorted(out.rglob("log.jsonl")):
        losses = [row["loss"] for row in map(json.loads, log.read_text().splitlines()) if "loss" in row]
        found[f"{log.relative_to(out).parent}/losses"] = torch.tensor(losses, dtype=torch.float64)
    for root in sorted(out.rglob("checkpoints")):
        last = max(root.iterdir(), key=lambda path: int(path.name))
        for file in sorted(last.glob("*.pt")):
            if file.stem != "run":  # the step and the states of global generators
                found |= tensors(torch.load(file, weights_only=True), f"{root.relative_to(out).parent}/{file.stem}")
    for file in sorted(path for pattern in FILES for path in out.rglob(pattern)):
        if not set(file.relative_to(out).parts) & set(NOT_COMPARED):
            content = load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
            found |= tensors(content, f"file {file.relative_to(out)}")
    return found


def tensors(state, name):
    """{path: tensor} of a nested state."""
    if isinstance(state, torch.Tensor):
        return {name: state}
    parts = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, (list, tuple)) else ()
    return {key: tensor for path, part in parts for key, tensor in tensors(part, f"{name}.{path}").items()}


# --- comparing --------------------------------------------------------------------------------------------------------

def fingerprint(tensor):
    content = tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode() + content).hexdigest()


def compare(old, new):
    """(equal, sentence) about two {name: tensor}, or two sentences that say why there are none.

    Tensors with the same name are compared by it. The others are compared as a multiset, since names may change.
    """
    for side, found in (("old", old), ("new", new)):
        if isinstance(found, str):
            return False, f"the {side} checkout failed: {found}"
    shared = [name for name in old if name in new]
    unequal = [name for name in shared if fingerprint(old[name]) != fingerprint(new[name])]
    left, right = (collections.Counter(fingerprint(found[name]) for name in found if name not in shared)
                   for found in (old, new))
    renamed = f", {left.total()} by content under another name" if left else ""
    if not unequal and left == right:
        return True, f"equal{renamed}"
    said = [f"{len(unequal)} of {len(shared)} differ, {worst(old, new, unequal)}"] if unequal else []
    if left != right:
        alone = [[name for name in found if name not in shared][:3] for found in (old, new)]
        said += [f"{count.total()} only in {side} ({', '.join(names)})" for count, side, names in
                 zip((left - right, right - left), ("old", "new"), alone)]
    return False, "; ".join(said)


def worst(old, new, names):
    """The largest absolute difference among tensors of these names, and where it is."""
    found = {name: float((old[name].double() - new[name].double()).abs().max()) if old[name].shape == new[name].shape
             else float("inf") for name in names if old[name].numel()}
    name = max(found, key=found.get)
    return f"by {found[name]:.2e} at most ({name}, {list(old[name].shape)} and {list(new[name].shape)})"


def networks(checkout, work):
    """{what: tensor}: what the shipped networks and classifiers answer to fixed inputs."""
    file = work / "networks.pt"
    call(checkout, ["-c", NETWORKS, json.dumps(LOADERS), file])
    return torch.load(file, weights_only=True)


def outputs(checkout, script, names, places, work, new, cache):
    """What `train` or `networks` gives, from the cache where that has it."""
    made_from = {name: CASES.get(name.removesuffix(", resumed"), NETWORKS) for name in names}
    key = hashlib.sha256(json.dumps([made_from, CHILD], default=str).encode()).hexdigest()[:16]
    file = cache / f"{script}-{key}.pt" if cache and not new else None
    if file and file.exists():
        return torch.load(file, weights_only=True)
    with tempfile.TemporaryDirectory(dir=work) as folder:
        folder = pathlib.Path(folder)
        found = ({"networks": networks(checkout, folder)} if script == "networks"
                 else train(checkout, script, names, places, folder, new))
    if file:
        torch.save(found, file)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--old", type=pathlib.Path, required=True, help="checkout of the first edition")
    parser.add_argument("--new", type=pathlib.Path, default=ROOT, help="checkout to compare (default: this one)")
    parser.add_argument("--only", default="", help="compare the cases whose name contains this")
    parser.add_argument("--cache", type=pathlib.Path, help="folder for data and the old checkout's tensors")
    given = parser.parse_args()
    scripts = {}
    for name in [*CASES, *(f"{name}, resumed" for name in RESUMED), "networks"]:
        if given.only in name:
            scripts.setdefault(name.split(",")[0], []).append(name)
    differs = 0
    with tempfile.TemporaryDirectory() as work:
        work = pathlib.Path(work)
        cache = given.cache.resolve() if given.cache else work / "cache"
        cache.mkdir(parents=True, exist_ok=True)
        old, new = given.old.resolve(), given.new.resolve()
        places = make_data(cache / "data", old)
        print("| case | tensors | result |\n|---|---|---|", flush=True)
        for script, names in scripts.items():
            one, other = (outputs(checkout, script, names, places, work, checkout is new, cache)
                          for checkout in (old, new))
            for name in names:
                equal, sentence = compare(one[name], other[name])
                differs += not equal
                count = len(other[name]) if isinstance(other[name], dict) else 0
                print(f"| {name} | {count} | {sentence} |", flush=True)
                whole = other.get(name.removesuffix(", resumed"))
                if name.endswith(", resumed") and whole is not None:
                    equal, sentence = compare(whole, other[name])
                    differs += not equal
                    print(f"| {name}, beside the unbroken run | {len(whole)} | {sentence} |", flush=True)
    print(f"{differs} differ" if differs else "all equal")
    return 1 if differs else 0


if __name__ == "__main__":
    sys.exit(main())
