"""A fine-tuned model at an earlier step: the base model, changed by what a checkpoint of the run holds.

Scripts write models, words and LoRA files at their end. To see what was learned and forgotten on the way (tables 8, 9
and 12 of the report) a run keeps some checkpoints, and `restore` opens one of them.
"""

import json
from pathlib import Path

from torch import nn

from nanodiff.errors import check
from nanodiff.finetune import lesson
from nanodiff.models import lora
from nanodiff.training.checkpoint import load_checkpoint

WHOLE, WORD, LORA = ("finetune", "dreambooth"), ("textual-inversion", "pivotal"), ("lora", "pivotal")


def restore(sd, run, step):
    """Changes a StableDiffusion, loaded from the run's base model, into the one of the run's checkpoint; returns it.

    UserError when there is no checkpoint of `step`, or the folder is of another script.
    """
    path = Path(run) / "config.json"
    config = json.loads(path.read_text()) if path.is_file() else {"script": "none"}
    script = config["script"]
    check(script in {*WHOLE, *WORD, *LORA}, f"{run} is no fine-tuning run (script {script}); expected the folder of "
          "one")
    state = load_checkpoint(Path(run) / "checkpoints" / f"{step:08d}")
    if script in WHOLE:
        nets = nn.ModuleDict({"unet": sd.unet, **({"text": sd.text_model} if config["train_text"] else {})})
        nets.load_state_dict(state["net"])
        if config.get("zero_snr"):
            lesson.end_in_noise(sd)
    if script in WORD:
        add_words(sd, [config["placeholder_token"]], config["num_vectors"],
                  state["net" if script == "textual-inversion" else "word"]["0"])
    if script in LORA:
        if script == "lora" and config["placeholder_token"]:
            vectors = state["net"].pop(str(len(state["net"]) - 1))
            add_words(sd, config["placeholder_token"], config["num_vectors"], vectors)
        paths = lora.find_targets(sd.networks, config["targets"])
        factors = lora.add(sd.networks, paths, config["rank"], config.get("alpha") or config["rank"], name="lora")
        nn.ParameterList(factors).load_state_dict(state["net"])
        sd.merge_lora()
    return sd


def add_words(sd, words, n, vectors):
    """Adds words of n vectors each to a model; vectors [len(words) * n, D]."""
    for word in words:
        sd.tokenizer.add_word(word, n)
    sd.text_model.add_rows(vectors)
