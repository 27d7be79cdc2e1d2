"""Training pictures: everything arrives as float32 [B,C,H,W] in [-1, 1]. Report: section 1.

A data set is anything with `len(d)`, `d.shape` (C, H, W), `d.labels` (int64 [N] or None), `d.classes` (list of str),
`d.captions` (list of str or None), `d.in_memory` and `d.read(index, draw)`; where `d.draws` is False, read needs no
draw and is given None. Three classes have this shape: `images.Images` (in memory), `folder.Folder` (files) and
`tomography.slices.Slices` (volumes). `training.datasets.load` finds one by its name; `training.batches.Batches` makes
the endless stream of batches out of any of them.
"""
