"""Measures of generated pictures. Every number is reported with its n and with the floor that real pictures reach.

    frechet.py         Fréchet distance between two sets of features
    kid.py             kernel distance between two sets of features, without bias
    modes.py           distance between samples (collapse); the modes of a known mixture that they cover
    inception.py       the network whose features make the Fréchet distance an FID; the user supplies its weights
    neighbours.py      coverage, precision, recall; distance to the nearest training picture (memorisation)
    image_quality.py   PSNR and SSIM
    perceptual.py      LPIPS, and the same distance on the project's own classifier
    reconstructions.py what an autoencoder preserves of pictures: PSNR, SSIM, classes read
    vae_elbo.py        a VAE's bound: both of its terms, and a tighter one
    gan_samples.py     what is measured of a generator's samples while it trains
    codebook.py        what the codes of a VQ-VAE preserve of pictures
    tsne.py            t-SNE, and how well neighbours in the plane share a label
    agreement.py       what the classifiers predict for samples; `judge`, which reports most of the above at once
"""
