"""Judges of generated pictures. Every number stands beside its n and beside the floor that real pictures reach.

    frechet.py      Fréchet distance between two sets of features
    neighbours.py   coverage, precision, recall; distance to the nearest training picture (memorisation)
    features.py     the digit reader (ten digits and "not a digit"), and judge_digits, which asks all of the above
    broken.py       pictures that are not digits, from which the reader learns its eleventh class
"""
