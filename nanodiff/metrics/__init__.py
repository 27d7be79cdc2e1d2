"""Judges of generated pictures. Every number stands beside its n and beside the floor that real pictures reach.

    frechet.py       Fréchet distance between two sets of features
    kid.py           kernel distance between two sets of features, without bias
    modes.py         how far samples are apart (collapse), and which modes of a known mixture they meet
    gan_samples.py   what is measured of a generator's samples while it trains
    reconstructions.py  what an autoencoder keeps of pictures: PSNR, SSIM, classes read
    vae_elbo.py      a VAE's bound: both of its terms, and a tighter one
    inception.py     the network whose features make the Fréchet distance an FID, with a user's file of weights
    neighbours.py    coverage, precision, recall; distance to the nearest training picture (memorisation)
    features.py      the reader: classes, colours and features of all the drawn worlds, and `judge`, which asks all of the
                     above; train_reader.py makes it, nonsense.py draws the class of pictures of nothing
    digits.py        the digit reader of 28 x 28 MNIST digits; broken.py draws what is not a digit
    tsne.py          points in the plane, neighbours beside neighbours; how well labels can be told there
    materials.py     fibre fraction, porosity and yarn period of a tomography slice or volume, from its grey values
"""
