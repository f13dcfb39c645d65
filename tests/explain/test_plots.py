"""Every explanation has a figure, and a page has them all."""

import subprocess
import sys
import warnings

import numpy as np
import pytest
from matplotlib.figure import Figure

from tests.explain.conftest import random_images
from vit_jax import explain
from vit_jax.errors import UserError


def photos():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), np.uint8) for size in ((60, 90), (300, 100))]


def panels(figure: Figure) -> list:
    """The axes with an image in them."""
    figure.canvas.draw()
    return [ax for ax in figure.findobj(lambda a: hasattr(a, "get_images")) if ax.get_images()]


@pytest.mark.parametrize(
    ("name", "count", "arguments"),
    [
        ("rollout", 2, ()),
        ("relevance", 2, ()),
        ("relevance", 3, (["ape", 4],)),
        ("attention_maps", 3, (0,)),
        ("map_attention", 3, ()),
        ("token_norms", 3, ()),
        ("feature_pca", 2, ()),
    ],
)
def test_images_and_maps_are_shown_in_their_own_aspect(network, name, count, arguments):
    figure = getattr(explain, f"plot_{name}")(network("MAP"), photos(), *arguments)
    shapes = [ax.get_images()[0].get_array().shape for ax in panels(figure)]
    assert sorted(shapes) == sorted(count * [(120, 180, 3)] + count * [(300, 100, 3)])


def test_the_network_itself_has_figures(network):
    vit = network("MAP")
    assert len(panels(explain.plot_position_similarity(vit))) == 1
    assert len(panels(explain.plot_embedding_filters(vit, 10))) == 10
    (ax,) = explain.plot_attention_distance(vit, random_images(vit)).axes
    expected = explain.attention_distance(vit, random_images(vit)).mean(axis=0)
    drawn = np.stack([line.get_ydata() for line in ax.lines], axis=1)
    np.testing.assert_allclose(drawn, np.c_[expected, expected.mean(axis=1)], rtol=1e-6)
    with pytest.raises(UserError, match="block is 2, expected 0 to 1"):
        explain.plot_attention_maps(vit, random_images(vit), 2)


def test_grey_images_and_names_in_any_script_are_drawn(network):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = explain.plot_rollout(network("grey"), random_images(network("grey"), 1))
        assert len(panels(figure)) == 2


def test_matplotlib_is_imported_by_figures_alone_and_pyplot_never():
    program = (
        "import sys, vit_jax.explain, vit_jax.page\n"
        "assert 'matplotlib' not in sys.modules\n"
        "vit_jax.page.new_figure(1, 1)\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
