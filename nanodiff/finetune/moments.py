"""A model as it was at a moment of its training: the base model, and what a checkpoint of a fine-tuning run holds.

Scripts write models, words and LoRA files at their end. To see what was learned and forgotten on the way (tables 8, 9
and 12 of the report) a run keeps some checkpoints, and `at` opens one of them.
"""

import json
from pathlib import Path

from torch import nn

from nanodiff.errors import UserError
from nanodiff.finetune import teaching, textual_inversion
from nanodiff.models import lora
from nanodiff.training.checkpoint import load_checkpoint

WHOLE, WORDS, LORAS = ("finetune", "dreambooth"), ("textual-inversion", "pivotal"), ("lora", "pivotal")


def at(sd, run, step):
    """Changes a StableDiffusion, freshly loaded and the one that `run` set out from, into what the run's checkpoint of
    `step` holds; returns it. UserError when there is no such checkpoint, or the folder is of another script."""
    path = Path(run) / "config.json"
    config = json.loads(path.read_text()) if path.is_file() else {"script": "none"}
    script = config["script"]
    if script not in {*WHOLE, *WORDS, *LORAS}:
        raise UserError(f"{run} is no fine-tuning run (script {script}); expected the folder of one")
    state = load_checkpoint(Path(run) / "checkpoints" / f"{step:08d}")
    if script in WHOLE:
        nets = nn.ModuleDict({"unet": sd.unet, **({"text": sd.text_model} if config["train_text"] else {})})
        nets.load_state_dict(state["net"])
        if config.get("zero_snr"):
            teaching.end_in_noise(sd)
    if script in WORDS:
        sd.tokenizer.add_word(config["word"], config["vectors"])
        sd.text_model.add_rows(state["net" if script == "textual-inversion" else "word"]["0"])
    if script in LORAS:
        if words := textual_inversion.named(config.get("words", "")):
            vectors = state["net"].pop(str(len(state["net"]) - 1))
            for word in words:
                sd.tokenizer.add_word(word, config.get("vectors", 1))
            sd.text_model.add_rows(vectors)
        paths = lora.find_targets(sd.networks, [place.strip() for place in config["places"].split(",")])
        alpha = config.get("alpha") or config["rank"]
        nn.ParameterList(lora.add(sd.networks, paths, config["rank"], alpha, name="lora")).load_state_dict(state["net"])
        sd.merge_lora()
    return sd
