"""How good a network is: exact figures and reports."""

from vit_jax.evaluation.metrics import Scores, evaluate, make_eval_step

__all__ = ["Scores", "evaluate", "make_eval_step"]
