"""The official variants: names, shapes and numbers of parameters, and making models by name."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import pytest
from flax.traverse_util import flatten_dict

import vit_jax
from tests import reference
from vit_jax import models
from vit_jax.errors import UserError
from vit_jax.models import Spec

NAMES = list(reference.facts("manifests"))
HEADS = {
    "1000": (1000, False),
    "21843": (21843, False),
    "none": (None, False),
    "1000+rep": (1000, True),
    "21843+rep": (21843, True),
}


def _shapes(model, images: tuple[int, ...] = (1, 224, 224, 3)) -> dict[str, tuple[int, ...]]:
    init = functools.partial(model.init, train=False)
    variables = jax.eval_shape(init, jax.random.key(0), jax.ShapeDtypeStruct(images, jnp.float32))
    assert set(variables) == {"params"}
    leaves = flatten_dict(variables["params"], sep="/")
    assert {leaf.dtype for leaf in leaves.values()} == {jnp.dtype("float32")}
    return {key: leaf.shape for key, leaf in leaves.items()}


def _spec(name: str, num_classes: int | None, representation_size: int | None, size: int) -> Spec:
    architecture = {k: v for k, v in models.variant(name).items() if k != "dropout_rate"}
    head = dict(num_classes=num_classes, representation_size=representation_size)
    return Spec(models.VisionTransformer(**architecture, **head), (size, size), 3)


def test_the_official_names_are_known():
    hybrids = {"R+ViT-Ti_16", "R26+ViT-S_32", "R26+ViT-B_32", "R50+ViT-B_16", "R50+ViT-L_32"}
    mixers = {"Mixer-B_16", "Mixer-B_32", "Mixer-L_16"}
    scaled = {f"ViT-{size}_14" for size in ("So400m", "g", "g-opt", "G", "G-opt", "e")}
    scaled |= {"ViT-mu_16", "ViT-M_16"}

    deit = {f"DeiT-{size}_16{more}" for size in ("Ti", "S", "B") for more in ("", "-distilled")}
    deit |= {*(f"DeiT3-{size}_16" for size in "SMBL"), "DeiT3-H_14"}
    dinov2 = {f"DINOv2-{size}_14{more}" for size in "SBLg" for more in ("", "-reg")}
    others = {f"SigLIP-{size}_16" for size in ("B", "L", "So400m", "g-opt")} | {"SigLIP-So400m_14"}
    others |= {"MAE-B_16", "MAE-L_16", "MAE-H_14"}
    tokens = {f"T2T-ViT-{i}" for i in (7, 10, 12, 14, 19, 24, "14-resnext", "14-wide")}
    tokens |= {f"T2T-ViT-t-{i}" for i in (14, 19, 24)}
    swins = {f"Swin-{size}_4-w{w}" for size in "TSBL" for w in (7, 12)} | {"Swin-T_4-c24-w8"}
    swins |= {f"SwinV2-{size}_4-w{w}" for size in "TSB" for w in (8, 16)}
    swins |= {f"SwinV2-{size}_4-w12{to}" for size in "BL" for to in ("", "to16", "to24")}

    assert set(vit_jax.list_models()) == (
        {*NAMES} | hybrids | mixers | scaled | deit | dinov2 | others | tokens | swins
    )
    assert len(vit_jax.list_models()) == 88
    assert len(NAMES) == 13


@pytest.mark.parametrize("name", NAMES)
def test_a_model_has_the_official_parameters(name):
    model = vit_jax.create_model(name, num_classes=1000)

    shapes = _shapes(model)

    assert shapes == reference.official_shapes(name, "1000")
    count = sum(math.prod(shape) for shape in shapes.values())
    assert count == reference.facts("manifests")[name]["n_params"]["1000"]


@pytest.mark.parametrize("head", ["none", "21843", "1000+rep", "21843+rep"])
def test_a_model_with_any_official_head_has_the_official_parameters(head):
    num_classes, has_representation = HEADS[head]
    model = vit_jax.create_model(
        "ViT-Ti_16", num_classes, representation_size=192 if has_representation else None
    )

    assert _shapes(model) == reference.official_shapes("ViT-Ti_16", head)


@pytest.mark.parametrize("name", NAMES)
def test_a_spec_lists_the_official_parameters_of_every_head(name):
    manifest = reference.facts("manifests")[name]
    for head, (num_classes, has_representation) in HEADS.items():
        width = models.variant(name)["hidden_size"] if has_representation else None
        spec = _spec(name, num_classes, width, 224)

        assert spec.name == name
        assert spec.shapes() == reference.official_shapes(name, head)
        assert spec.num_parameters == manifest["n_params"][head]


@pytest.mark.parametrize("name", ["ViT-Ti_16", "ViT-B_32-gap-norep", "ViT-H_14"])
def test_a_spec_lists_the_official_parameters_at_other_resolutions(name):
    sizes = [int(size) for size in reference.facts("manifests")[name]["positions"]]
    assert len(sizes) > 1
    for size in sizes:
        spec = _spec(name, 1000, None, size)
        assert spec.shapes() == reference.official_shapes(name, "1000", size)


def test_the_committed_shapes_are_those_of_the_full_manifests(shared):
    for name in NAMES:
        full = json.loads((shared / "official" / "manifests" / f"{name}.json").read_text())
        for head in HEADS:
            expected = {k: tuple(v) for k, v in (full["params"] | full["heads"][head]).items()}
            assert reference.official_shapes(name, head, full["image_size"]) == expected


def test_the_leading_vit_may_be_left_out():
    assert vit_jax.create_model("B_32-gap-norep", 7) == vit_jax.create_model(
        "ViT-B_32-gap-norep", num_classes=7
    )


def test_any_field_may_be_overridden():
    model = vit_jax.create_model("ViT-Ti_16", 10, patch_size=(8, 4), num_layers=2, dropout_rate=0.5)

    assert (model.patch_size, model.num_layers, model.dropout_rate) == ((8, 4), 2, 0.5)
    assert (model.hidden_size, model.num_classes) == (192, 10)


def test_changing_a_variant_leaves_the_table_alone():
    models.variant("ViT-Ti_16")["hidden_size"] = 1

    assert models.variant("ViT-Ti_16")["hidden_size"] == 192


def test_an_unknown_name_is_answered_with_the_nearest_ones():
    with pytest.raises(UserError, match=r"unknown model 'ViT-Ti16': did you mean ViT-Ti_16"):
        vit_jax.create_model("ViT-Ti16")
    with pytest.raises(UserError, match=r"unknown model '\?\?\?': known: ViT-Ti_16, ViT-S_16"):
        vit_jax.create_model("???")


def test_an_unknown_field_is_answered_with_the_nearest_one():
    with pytest.raises(UserError, match=r"unknown field 'droput_rate'.*did you mean dropout_rate"):
        vit_jax.create_model("ViT-Ti_16", droput_rate=0.1)
    with pytest.raises(UserError, match=r"unknown field 'zzz'.*known: .*dropout_rate"):
        vit_jax.create_model("ViT-Ti_16", zzz=1)


def test_every_field_of_a_variant_is_a_field_of_the_model():
    for name, fields in models.VARIANTS.items():
        kinds = {"Mixer": models.MlpMixer, "Swin": models.SwinTransformer, "T2T": models.T2TViT}
        found = [module for start, module in kinds.items() if name.startswith(start)]
        module = models.family_of(name)
        assert [module] == (found or [models.VisionTransformer])
        assert set(fields) <= {field.name for field in dataclasses.fields(module)}
