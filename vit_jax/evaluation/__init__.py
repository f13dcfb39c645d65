"""How good a network is: exact metrics and reports."""

from vit_jax.evaluation.metrics import Scores, evaluate, make_eval_step
from vit_jax.evaluation.zero_shot import class_embeddings, classify, zero_shot

__all__ = ["Scores", "class_embeddings", "classify", "evaluate", "make_eval_step", "zero_shot"]
