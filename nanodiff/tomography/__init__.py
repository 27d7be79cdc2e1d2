"""Tomography volumes of woven composites: their files, their slices as training pictures, and material measures."""
