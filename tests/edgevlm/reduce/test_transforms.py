"""Maps of the grid: against transforms by FFT, and against torch's own pooling."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from edgevlm.document import Complaint
from edgevlm.reduce.piece import Transform
from edgevlm.reduce.transforms.fourier import Fourier, cosines
from edgevlm.reduce.transforms.pool import AvgPool, Elastic
from edgevlm.reduce.transforms.windows import Windows
from tests.edgevlm.reduce.early import GRID, left_by, stage, views


def forth(x: np.ndarray) -> np.ndarray:
    """The orthonormal DCT-II along the first axis, by an FFT of the mirrored numbers."""
    size = len(x)
    mirrored = np.fft.fft(np.concatenate([x, x[::-1]]), axis=0)[:size]
    turned = mirrored * np.exp(-0.5j * np.pi * np.arange(size) / size)[:, None]
    found: np.ndarray = turned.real / 2 * np.sqrt(2 / size)
    found[0] /= np.sqrt(2)
    return found


def back(x: np.ndarray) -> np.ndarray:
    """Its inverse, by an FFT as well."""
    size = len(x)
    scaled = x * np.sqrt(size / 2)
    scaled[0] *= np.sqrt(2)
    spectrum = np.zeros((2 * size, *x.shape[1:]), complex)
    spectrum[:size] = 2 * scaled * np.exp(0.5j * np.pi * np.arange(size) / size)[:, None]
    spectrum[size + 1 :] = spectrum[1:size][::-1].conj()
    found: np.ndarray = np.fft.ifft(spectrum, axis=0)[:size].real
    return found


@pytest.mark.parametrize(("old", "new"), [(24, 12), (24, 24), (27, 13), (5, 1)])
def test_the_matrix_is_the_transform_by_fft(old: int, new: int) -> None:
    x = np.random.default_rng(old).standard_normal((old, 6))
    np.testing.assert_allclose(back(forth(x)), x, atol=1e-13, rtol=0)
    cut = back(forth(x)[:new])
    for preserve_mean, scale in ((False, 1.0), (True, np.sqrt(new / old))):
        matrix = Fourier(preserve_mean=preserve_mean).matrix(old, new)
        # Sums of 27 numbers in float64.
        np.testing.assert_allclose(matrix @ x, scale * cut, atol=1e-13, rtol=0)


@pytest.mark.parametrize("size", [1, 2, 7, 24])
def test_all_frequencies_are_the_identity(size: int) -> None:
    for preserve_mean in (False, True):
        matrix = Fourier(preserve_mean=preserve_mean).matrix(size, size)
        np.testing.assert_allclose(matrix, np.eye(size), atol=1e-13, rtol=0)


@pytest.mark.parametrize("transform", [Fourier(), AvgPool(), Elastic(), Windows()])
def test_a_constant_maps_to_itself(transform: Transform) -> None:
    for old, new in ((24, 12), (24, 6), (6, 6)):
        np.testing.assert_allclose(transform.matrix(old, new).sum(1), 1.0, atol=1e-13, rtol=0)


def test_what_is_cut_keeps_its_energy() -> None:
    """Parseval on the frequencies that are kept."""
    x = np.random.default_rng(0).standard_normal((24, 6))
    kept = (cosines(24) @ x)[:12]
    made = Fourier(preserve_mean=False).matrix(24, 12) @ x
    np.testing.assert_allclose(np.square(made).sum(0), np.square(kept).sum(0), rtol=1e-13)


def pooled(module: nn.Module, batch: int = 2) -> np.ndarray:
    """What torch makes of the features, as a picture."""
    features = views("none", batch).torch.tokens.features
    picture = features.transpose(1, 2).unflatten(2, GRID)
    found: np.ndarray = module(picture).flatten(2).transpose(1, 2).numpy()
    return found


@pytest.mark.parametrize(
    ("written", "count", "module"),
    [
        ({"transform": "avgpool"}, 6, nn.AvgPool2d(2)),
        ({"transform": "elastic"}, 6, nn.AdaptiveAvgPool2d((2, 3))),
        ({"transform": "elastic"}, 15, nn.AdaptiveAvgPool2d((3, 5))),
        ({"transform": "elastic"}, 24, nn.AdaptiveAvgPool2d((4, 6))),
        ({"at": "encoder.layers", "transform": "windows"}, 6, nn.AvgPool2d(2)),
    ],
)
def test_pooling_is_that_of_torch(written: dict[str, str], count: int, module: nn.Module) -> None:
    found = left_by(stage(count, **written), views("none", 2))
    # Means of a few numbers of size one, in float32.
    np.testing.assert_allclose(found.features, pooled(module), atol=1e-6, rtol=0)


@pytest.mark.parametrize("old", [5, 24, 27])
def test_elastic_windows_are_those_of_torch(old: int) -> None:
    x = torch.randn(1, 3, old, dtype=torch.float64)
    for new in range(1, old + 1):
        wanted = nn.functional.adaptive_avg_pool1d(x, new)[0].T.numpy()
        found = Elastic().matrix(old, new) @ x[0].T.numpy()
        np.testing.assert_allclose(found, wanted, atol=1e-13, rtol=0)


def test_windows_halve_as_often_as_it_takes() -> None:
    assert Windows().steps((24, 24), 576) == ((24, 24),)
    assert Windows().steps((24, 24), 144) == ((12, 12),)
    assert Windows().steps((24, 16), 100) == ((12, 8),)
    assert Windows().steps((24, 24), 36) == ((12, 12), (6, 6))


def test_sides_that_are_odd_have_no_windows() -> None:
    with pytest.raises(Complaint) as error:
        Windows().steps((54, 54), 500)
    assert (error.value.message, error.value.hint) == (
        "a grid of 27 x 27 tokens has no whole windows of 2 x 2, and 500 of its 729 are to be left",
        "pool behind the encoder: write at: encoder, transform: elastic",
    )


def test_places_are_those_of_the_whole_picture() -> None:
    both = views("none")
    once = left_by(stage(6, at="encoder.layers", transform="windows"), both)
    # Of 4 x 6 tokens the middles of six windows, as near as a token comes to them.
    assert once.places.tolist() == [[7, 9, 11, 19, 21, 23]]
    moved = both.tokens(places=both.numpy.tokens.places * 10)
    twice = left_by(stage(6, at="encoder.layers", transform="windows"), moved)
    assert twice.places.tolist() == [[70, 90, 110, 190, 210, 230]]
    assert once.sizes is None, "attention is not to weigh a window's mean by four"
