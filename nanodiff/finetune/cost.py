"""What a fine-tuning costs in parameters and memory, and how far it moves the weights."""

import torch


def report_memory(run, sd, trained, lesson, prior=None):
    """Prints how much is trained and the memory a step needs, estimated; returns the number of trained parameters.

    Weights, then gradients and AdamW's two moments of what is trained, then activations: what the forward pass of a
    batch saves for the backward pass, extrapolated from batches of one and of two, which are measured here. prior: its
    pictures are part of the batch.
    """
    count = sum(p.numel() for p in trained)
    batch = lesson.batches.share + (prior.batches.share if prior else 0)
    networks = sd.unet, sd.text_model, sd.autoencoder
    weights = sum(p.numel() * p.element_size() for net in networks for p in net.parameters())
    one, two = (activation_bytes(sd, lesson, n) for n in (1, 2))
    activations = one + (batch - 1) * (two - one)
    hint = (", and one block's while it is computed again" if sd.unet.checkpointing else
            ", less with --gradient_checkpointing")
    total = weights + 12 * count + activations
    run.print(f"{count:,} trained parameters; about {total / 2**20:,.0f} MiB: weights {weights / 2**20:,.0f}, "
              f"gradients and moments {12 * count / 2**20:,.0f}, activations {activations / 2**20:,.0f}{hint}")
    return count


def activation_bytes(sd, lesson, n=1):
    """Bytes that the U-Net's forward pass of n latents saves for its backward pass, without the weights."""
    x = lesson.training.mean[:1, 0].to(sd.device).repeat(n, 1, 1, 1)
    weights = {p.untyped_storage().data_ptr() for p in sd.unet.parameters() if p.layout == torch.strided}
    saved = {}  # a storage's address: its bytes, and a tensor in it, so that no other takes its place

    def note(tensor):
        if tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                saved[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = sd.unet(x.requires_grad_(True), torch.zeros(n, device=sd.device), sd.encode_text([""] * n))
    del out
    return sum(size for size, _ in saved.values())


@torch.no_grad()
def weight_changes(net, before):
    """{"all": |W' - W| / |W| of all parameters of a network, name: of each matrix or kernel alone}, the largest first.

    before: the parameters before training. Frobenius norms.
    """
    squares = [(name, float((p - old).double().square().sum()), float(old.double().square().sum()), p.ndim)
               for (name, p), old in zip(net.named_parameters(), before)]
    overall = sum(change for _, change, _, _ in squares) / max(sum(weight for _, _, weight, _ in squares), 1e-30)
    each = {name: (change / max(weight, 1e-30)) ** 0.5 for name, change, weight, ndim in squares if ndim > 1}
    return {"all": overall**0.5, **dict(sorted(each.items(), key=lambda item: -item[1]))}


def change_sentence(changes):
    """`weight_changes` in a sentence: of all weights, of the median layer and of the most changed one."""
    each = list(changes.items())[1:]
    (largest, size), middle = each[0], each[len(each) // 2][1]
    return (f"the weights changed by {changes['all']:.2%} of their norm, a layer's by {middle:.2%} in the middle and "
            f"{size:.2%} at most ({largest})")


def folder_bytes(folder):
    """The size of all files of a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
