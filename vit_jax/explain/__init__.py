"""What a Vision Transformer looks at: attention, relevance, features, and images of them.

Each function takes what `vit_jax.load` gives, those of images also images as `predict` takes
them or preprocessed arrays, and returns an array. Its twin `plot_...` takes the same and returns a
matplotlib figure.
"""

from vit_jax.explain.attention import attention_distance, attention_maps, map_attention, rollout
from vit_jax.explain.features import (
    embedding_filters,
    feature_pca,
    position_similarity,
    token_norms,
)
from vit_jax.explain.pages import page_figure, page_html
from vit_jax.explain.plots import (
    plot_attention_distance,
    plot_attention_maps,
    plot_embedding_filters,
    plot_feature_pca,
    plot_map_attention,
    plot_position_similarity,
    plot_relevance,
    plot_rollout,
    plot_token_norms,
)
from vit_jax.explain.relevance import relevance
from vit_jax.explain.summary import Explanation, explanations

__all__ = [
    "Explanation",
    "attention_distance",
    "attention_maps",
    "embedding_filters",
    "explanations",
    "feature_pca",
    "map_attention",
    "page_figure",
    "page_html",
    "plot_attention_distance",
    "plot_attention_maps",
    "plot_embedding_filters",
    "plot_feature_pca",
    "plot_map_attention",
    "plot_position_similarity",
    "plot_relevance",
    "plot_rollout",
    "plot_token_norms",
    "position_similarity",
    "relevance",
    "rollout",
    "token_norms",
]
