"""Folded weights: another form of the same network, in the tree of the original's code."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from tests import families, reference
from tests.checkpoints.test_torch import close, images, written
from vit_jax import load
from vit_jax.checkpoints import to_tree
from vit_jax.checkpoints.fold import fold
from vit_jax.cli import main
from vit_jax.data import parse
from vit_jax.errors import UserError
from vit_jax.models import VisionTransformer
from vit_jax.pretrained import Pretrained

IMAGENET = "normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))"
SHORT = f"resize_small(18, method='pil_bicubic')|central_crop(16)|{IMAGENET}"


@pytest.fixture(autouse=True)
def _exact():
    with jax.default_matmul_precision("highest"):
        yield


def network(preprocess: str = SHORT, **fields) -> Pretrained:
    spec = families.vit_spec(**dict(num_layers=1) | fields)
    params = to_tree(reference.make_params(spec.shapes(), seed=3))
    return Pretrained(spec.model(), params, spec, None, preprocess)


def folded(vit: Pretrained) -> Pretrained:
    arrays, spec, preprocess, _ = fold(flatten_dict(vit.params, sep="/"), vit.spec, vit.preprocess)
    new = dict(model=spec.model(), params=to_tree(arrays), spec=spec, preprocess=preprocess)
    return dataclasses.replace(vit, **new)


def answers(vit: Pretrained, seed: int = 0) -> np.ndarray:
    """Of images of 0 to 255, given the network's own values."""
    shape = (2, *vit.image_size, vit.spec.channels)
    pixels = np.random.default_rng(seed).integers(0, 256, shape).astype(np.float32)
    return vit(parse(vit.preprocess).range(pixels))


def plain(vit: Pretrained) -> VisionTransformer:
    """The same sizes, and all that the original's code doesn't ask for as it is by default."""
    names = ("num_classes", "patch_size", "hidden_size", "num_layers", "num_heads", "mlp_dim")
    names += ("classifier", "representation_size", "resnet")
    return VisionTransformer(**{name: getattr(vit.spec, name) for name in names})


# What the original computes too, once it is folded.
EXACT = {
    "nothing": dict(preprocess="resize(16)|value_range(-1, 1)"),
    "values of grey": dict(channels=1, preprocess="resize(16)|normalize(0.3, 0.2)"),
    "values of 0 to 1": dict(preprocess="resize(16)|value_range(0, 1)"),
    "DeiT-III": dict(
        num_layers=2, layer_scale=0.1, cls_has_position=False, drop_path_mode="constant"
    ),
    "no biases": dict(qkv_bias=False),
    "fixed positions": dict(position_embedding="sincos2d"),
    "fixed positions without a class token": dict(position_embedding="sincos2d", classifier="gap"),
    "a small epsilon": dict(layer_norm_epsilon=1e-12, image_size=(16, 20)),
    "a large epsilon": dict(layer_norm_epsilon=1e-2, num_classes=None, cls_has_position=False),
    "pre_logits": dict(layer_norm_epsilon=1e-3, representation_size=7),
    "every token": dict(classifier="token_unpooled", layer_norm_epsilon=1e-3),
}


@pytest.mark.parametrize("name", EXACT)
def test_the_originals_network_computes_the_same(name, tmp_path):
    vit = network(**EXACT[name])

    other = folded(vit)

    close(answers(other), answers(vit))
    assert other.preprocess.endswith("|value_range(-1, 1)")
    x = parse(other.preprocess).range(np.float32([[[[0.0], [100.0]], [[200.0], [255.0]]]]))
    assert (x.min(), x.max()) == (-1, 1)
    pixels = images(vit.spec)
    found = plain(other).apply({"params": other.params}, pixels)
    assert np.shape(found) == other(pixels).shape
    close(np.asarray(found), other(pixels))


@pytest.mark.parametrize(
    "fields",
    [
        dict(num_registers=3, layer_norm_epsilon=1e-5, layer_scale=0.1, activation="gelu_erf"),
        dict(mlp="swiglu", layer_scale=0.1, layer_norm_epsilon=1e-3),
        dict(distilled="heads", layer_norm_epsilon=1e-3, cls_has_position=False),
        dict(distilled="token", position_embedding="sincos2d"),
        dict(classifier="token_gap", layer_norm_epsilon=1e-3),
        dict(classifier="map", layer_norm_epsilon=1e-3, layer_scale=0.1),
        dict(classifier="gap", fc_norm=True, unread_class_token=True, layer_norm_epsilon=1e-3),
    ],
    ids=lambda fields: "-".join(map(str, fields.values())),
)
def test_what_the_original_has_not_is_folded_too_and_stays(fields):
    vit = network(**fields)
    other = folded(vit)
    close(answers(other), answers(vit))
    for name in ("num_registers", "mlp", "distilled", "classifier", "fc_norm", "activation"):
        assert getattr(other.spec, name) == getattr(vit.spec, name)
    assert (other.spec.layer_norm_epsilon == 1e-6) == (fields.get("classifier") != "map")


def test_what_can_not_be_folded_is_refused():
    hybrid = families.SPECS["hybrid"]
    vit = network(image_size=hybrid.image_size, patch_size=(1, 1), resnet=(1, 1))
    with pytest.raises(UserError, match=r"values of -2\.1179 to .* can't be folded into a ResNet"):
        folded(vit)
    folded(dataclasses.replace(vit, preprocess="resize(64)|value_range(-1, 1)"))
    with pytest.raises(UserError, match="a Mixer can't be folded, only a ViT"):
        fold({}, families.SPECS["Mixer"], "value_range(-1, 1)")
    with pytest.raises(UserError, match="doesn't end with mean and deviation"):
        folded(network(preprocess=f"{IMAGENET}|resize(16)"))


# The command.


def run(capsys, *arguments) -> str:
    assert main(["convert", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_deit_3_runs_in_the_originals_code_but_for_its_gelu(tmp_path, capsys):
    path = written("timm-deit3", tmp_path)
    target = tmp_path / "plain.npz"
    assert main(["convert", str(path), str(target), "--fold"]) == 2
    assert capsys.readouterr().err == (
        "vit-jax: the original's code doesn't have activation 'gelu_erf', only 'gelu_tanh': say "
        "--approximate to take that, and see how much the logits change\n"
    )
    assert not target.exists()

    text = run(capsys, path, target, "--fold", "--approximate")

    assert (
        "folded: LayerScale; zeros for the position of the class token; values of images of "
        "-2.1179 to 2.24891, -2.03571 to 2.42857, -1.80444 to 2.64, which now are -1 to 1\n"
        "replaced: activation 'gelu_erf' by 'gelu_tanh'\n"
        "so logits of 16 random images change by "
    ) in text
    vit, before = load(target), load(path)
    assert vit.preprocess.endswith("|central_crop((12, 20), round_even=True)|value_range(-1, 1)")
    assert vit.spec.position_resize == before.spec.position_resize
    x = images(vit.spec)
    close(np.asarray(plain(vit).apply({"params": vit.params}, x)), vit(x))
    close(answers(vit), answers(folded(load(path, activation="gelu_tanh"))))


def test_how_much_an_approximation_changes_is_said_in_numbers(tmp_path, capsys):
    path = written("timm-vit", tmp_path)
    both = ["--fold", "--approximate", "--json"]
    facts = json.loads(run(capsys, path, tmp_path / "a.npz", *both))
    assert facts["replaced"] == {"activation": ["gelu_erf", "gelu_tanh"]}
    assert 0 < facts["difference"]["relative"] < 0.01
    assert facts["difference"]["top1"] == 1
    facts = json.loads(run(capsys, written("timm-tanh", tmp_path), tmp_path / "b.npz", *both))
    assert facts["replaced"] == {}
    assert "difference" not in facts


def test_of_answers_that_are_all_0_an_approximation_changes_nothing(tmp_path, capsys):
    path = written("timm-vit", tmp_path)
    vit = load(path)
    vit.params["head"] = {name: np.zeros_like(x) for name, x in vit.params["head"].items()}
    vit.save(tmp_path / "fresh.npz")
    arguments = [tmp_path / "fresh.npz", tmp_path / "a.npz", "--fold", "--approximate"]

    text = run(capsys, *arguments)
    facts = json.loads(run(capsys, *arguments, "--force", "--json"))

    assert "logits of 16 random images change by 0 at most, and all of them were 0; the" in text
    assert facts["difference"] == {"largest": 0, "relative": None, "top1": 1}
    assert load(tmp_path / "a.npz").spec.activation == "gelu_tanh"


def test_another_epsilon_goes_to_timm_folded_or_approximated(tmp_path, capsys):
    path, folder = written("hf-vit", tmp_path), tmp_path / "timm"
    assert main(["convert", str(path), str(folder), "--to", "timm"]) == 2
    assert "timm doesn't compute layer_norm_epsilon 1e-12: say --fold" in capsys.readouterr().err

    run(capsys, path, folder, "--to", "timm", "--fold")
    x = images(load(path).spec)
    close(load(folder)(x), load(path)(x))

    text = run(capsys, path, folder, "--to=timm", "--approximate", "--force")
    assert "replaced: layer_norm_epsilon 1e-12 by 1e-06" in text
    assert load(folder).spec.layer_norm_epsilon == 1e-6


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("timm-dinov2-reg", "4 registers"),
        ("timm-dinov2-giant", "SwiGLU"),
        ("timm-deit-distilled", "a distillation token"),
        ("timm-siglip", "classifier 'map'"),
        ("hf-dinov2", "classifier 'token_gap'"),
        ("fb-mae-fine-tuned", "a class token that the head doesn't read nor a LayerNorm behind"),
    ],
)
def test_what_the_original_has_not_is_refused_by_name(name, words, tmp_path, capsys):
    arguments = [str(written(name, tmp_path)), str(tmp_path / "a.npz"), "--heads=3"]
    assert main(["convert", *arguments, "--fold", "--approximate"]) == 2
    assert f"vit-jax: the original's code doesn't have {words}" in capsys.readouterr().err
    assert not (tmp_path / "a.npz").exists()


def test_mistakes_are_one_line_and_nothing_is_replaced(tmp_path, capsys):
    path = written("timm-tanh", tmp_path)
    (tmp_path / "there.json").write_text("mine")
    for arguments, message in [
        (["a.npz", "--approximate"], "--approximate goes with --to or --fold"),
        (["a.npz", "--fold", "--dtype=bfloat16"], "--fold writes float32"),
        (["a.pt", "--fold"], "expected a name that ends in"),
        (["there.npz", "--fold"], "there.json is there already"),
        (["model.npz", "--fold", "--force"], "model.npz would share"),
        (["there.json", "--to=timm"], "there.json is a file, expected a folder to write to"),
        (["there.json/x", "--to=hf"], "can't make the folder"),
    ]:
        target, *options = arguments
        assert main(["convert", str(path), str(tmp_path / target), *options]) == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / "there.json").read_text() == "mine"
    run(capsys, path, tmp_path / "old.npz", "--fold", "--style=prelinen")
    assert "Transformer/encoderblock_0/MlpBlock_3/Dense_0/bias" in np.load(tmp_path / "old.npz")
