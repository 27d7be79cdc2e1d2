"""Training images: every batch is float32 [B,C,H,W] in [-1, 1]. Report: section 1.

A data set `d` is any object with these members:

    len(d)               number of images, N
    d.shape              (C, H, W) of one image
    d.labels             int64 [N], or None
    d.classes            list of str
    d.captions           list of str, or None
    d.in_memory          True when the pixels are held in memory
    d.read(index, draw)  float32 [B,C,H,W]; index and draw int64 [B]
    d.draws              optional; False when `read` draws no random numbers and takes draw=None

Three classes implement it: `images.Images` (in memory), `folder.Folder` (files) and `tomography.slices.Slices`
(volumes). `training.datasets.load` returns a data set by name. `training.batches.Batches` turns one into an endless
stream of batches.
"""
