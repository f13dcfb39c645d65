"""What a Vision Transformer looks at: attention, relevance, features, and images of them.

Each function takes what `vit_jax.load` gives, those of images also images as `predict` takes
them or preprocessed arrays, and returns an array. Its twin `plot_...` takes the same and returns a
matplotlib figure.
"""

# ruff: noqa: F401 (these are the names of the package)
from vit_jax.explain.attention import (
    attention_distance,
    attention_maps,
    map_attention,
    plot_attention_distance,
    plot_attention_maps,
    plot_map_attention,
    plot_rollout,
    rollout,
)
from vit_jax.explain.features import (
    embedding_filters,
    feature_pca,
    plot_embedding_filters,
    plot_feature_pca,
    plot_position_similarity,
    plot_token_norms,
    position_similarity,
    token_norms,
)
from vit_jax.explain.pages import Explanation, explanations, page_figure, page_html
from vit_jax.explain.relevance import plot_relevance, relevance
