"""Judges of generated pictures. Every number stands beside its n and beside the floor that real pictures reach.

    frechet.py       Fréchet distance between two sets of features
    neighbours.py    coverage, precision, recall; distance to the nearest training picture (memorisation)
    features.py      the reader: classes, colours and features of all the drawn worlds, and `judge`, which asks all of the
                     above; train_reader.py makes it, nonsense.py draws the class of pictures of nothing
    digits.py        the digit reader of 28 x 28 MNIST digits; broken.py draws what is not a digit
    materials.py     fibre fraction, porosity and yarn period of a tomography slice or volume, from its grey values
"""
