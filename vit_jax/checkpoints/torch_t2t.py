"""T2T-ViT (arXiv:2101.11986), as its authors published it: what `torch.read_torch` has to know."""

import logging
import re

from vit_jax.checkpoints.torch import FAMILIES, TIMM, Arrays, Known, Layout, Table, _dense, _norm
from vit_jax.errors import UserError

_ORDER = {"kqv": ("key", "query", "value"), "attn.qkv": ("query", "key", "value")}
# What its evaluation does to images, and that of its fine-tuning on CIFAR.
_IMAGENET = {"crop_pct": 0.9, "interpolation": "bicubic"}
_CIFAR = {
    "crop_pct": 1.0,
    "interpolation": "bilinear",
    "mean": [0.4914, 0.4822, 0.4465],
    "std": [0.2023, 0.1994, 0.2010],
}

_log = logging.getLogger(__name__)


def _table(attention: str, out: str, mlp: tuple[str, str]) -> Table:
    table: Table = {}
    for step in ("tokens_to_token.attention1", "tokens_to_token.attention2"):
        ours = step.replace(".", "/")
        table |= {
            f"{step}.w": ((f"{ours}/features",), "same"),
            **_norm(f"{step}.norm1", f"{ours}/LayerNorm_0"),
            **_dense(f"{step}.{attention}", *(f"{ours}/{part}" for part in _ORDER[attention])),
            **_dense(f"{step}.{out}", f"{ours}/out"),
            **_norm(f"{step}.norm2", f"{ours}/LayerNorm_1"),
            **_dense(f"{step}.{mlp[0]}", f"{ours}/MlpBlock_0/Dense_0"),
            **_dense(f"{step}.{mlp[1]}", f"{ours}/MlpBlock_0/Dense_1"),
        }
    as_timm = re.compile(r"cls_token|pos_embed|blocks\.\{i\}\.(norm|attn|mlp)|norm\.|head\.")
    table |= _dense("tokens_to_token.project", "tokens_to_token/project")
    return table | {name: rule for name, rule in TIMM.items() if as_timm.match(name)}


PERFORMER = _table("kqv", "proj", ("mlp.0", "mlp.2"))
TRANSFORMER = _table("attn.qkv", "attn.proj", ("mlp.fc1", "mlp.fc2"))


def t2t_layout(inside: Arrays, known: Known) -> Layout | None:
    """The layout of a T2T-ViT's arrays; None if they are another network's."""
    if "tokens_to_token.project.weight" not in inside:
        return None
    name, width = known.file.lower(), inside["tokens_to_token.project.weight"].shape[0]
    is_performer = any(".kqv." in key for key in inside)
    depth = sum(re.fullmatch(r"blocks\.\d+\.norm1\.bias", key) is not None for key in inside)
    may_be_resnext = is_performer and (depth, width) == (14, 384)
    if known.heads is None and may_be_resnext:
        if "resnext" in name:
            raise UserError(
                "its name says T2T-ViT-14-resnext, of 32 attention heads, but no array tells it "
                "from T2T-ViT-14, which has 6: give their number, heads=32"
            )
        if not re.search(r"t2t[-_]vit[-_]14", name):
            _log.warning(
                "no array tells T2T-ViT-14 from T2T-ViT-14-resnext: taken as the former, of 6 "
                "attention heads. If that is wrong, tell: load(..., heads=32)"
            )
    is_cifar = re.match(r"ci\w*far\d", name)  # One of them is called cirfar.
    kind = f"T2T-ViT of a {'performer' if is_performer else 'transformer'}"
    table = PERFORMER if is_performer else TRANSFORMER
    config = {"pretrained_cfg": _CIFAR if is_cifar else _IMAGENET}
    return Layout(kind, table, "$^", {"classifier": "token"}, config)


FAMILIES.append(t2t_layout)
