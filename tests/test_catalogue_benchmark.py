"""The counting models beside which benchmarks/catalogue.py puts every recipe."""

import numpy as np

from benchmarks import catalogue


def test_counting_knows_how_often_bytes_are_and_what_follows():
    text = np.frombuffer(b"ab" * 50_000, np.uint8)
    windows = np.frombuffer(b"abababab" * 2, np.uint8).reshape(2, 8)
    found = catalogue.counting_losses(text, windows)
    np.testing.assert_allclose(found["unigram"], np.log(2), atol=3e-3)
    assert 0 < found["bigram"] < 6e-3


def test_nothing_unseen_is_impossible():
    text, windows = np.zeros(1000, np.uint8), np.full((1, 3), 255, np.uint8)
    found = catalogue.counting_losses(text, windows)
    np.testing.assert_allclose(found["unigram"], np.log(1256))
    np.testing.assert_allclose(found["bigram"], np.log(256))
