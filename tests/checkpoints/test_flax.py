"""Flax's own files, .msgpack: those of transformers and of deit3-jax."""

import json

import flax
import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import optax
import pytest
from flax.serialization import msgpack_serialize
from flax.training.checkpoints import save_checkpoint
from flax.traverse_util import unflatten_dict

from tests import families
from tests.checkpoints.test_torch import close, written
from tests.torch_models import stored
from vit_jax import load
from vit_jax.checkpoints import open_arrays
from vit_jax.checkpoints.formats import container
from vit_jax.cli import main
from vit_jax.errors import UserError


def save(path, arrays):
    path.write_bytes(msgpack_serialize(unflatten_dict(arrays, sep="/")))
    return path


def as_flax(key: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    """What stands for an array of PyTorch's in transformers' Flax networks."""
    name = key.replace(".", "/")
    if key.endswith(".weight") and array.ndim == 1:
        return f"{name.removesuffix('weight')}scale", array
    axes = {2: (1, 0), 4: (2, 3, 1, 0)}.get(array.ndim)
    if key.endswith(".weight"):
        return f"{name.removesuffix('weight')}kernel", np.ascontiguousarray(array.transpose(axes))
    return name, array


@pytest.mark.parametrize("name", ["hf-vit", "hf-dinov2", "hf-dinov2-giant"])
def test_a_network_of_transformers_in_flax_is_that_in_pytorch(name, tmp_path):
    theirs, case = load(written(name, tmp_path)), stored(name)
    arrays = dict(as_flax(key, array) for key, array in case.arrays.items())
    (tmp_path / "model.safetensors").unlink()
    save(tmp_path / "flax_model.msgpack", arrays)

    vit = load(tmp_path)

    assert vit.spec == theirs.spec
    jax.tree.map(np.testing.assert_array_equal, vit.params, theirs.params)
    assert vit.preprocess == theirs.preprocess
    vit.params["head" if "head" in vit.params else "embedding"]["bias"][:] = 0  # May be changed.


def test_look_alikes_in_flax_are_refused_by_name(tmp_path):
    arrays = {
        "vision_model/embeddings/class_embedding": np.zeros(12, np.float32),
        "vision_model/embeddings/patch_embedding/kernel": np.zeros((4, 4, 3, 12), np.float32),
    }
    with pytest.raises(UserError, match="it is CLIP, by its arrays"):
        load(save(tmp_path / "flax_model.msgpack", arrays))


def deit3_jax(scaled: bool) -> dict[str, np.ndarray]:
    """Arrays as deit3-jax has them, for images of 12 x 12 pixels."""
    shapes = {
        "embed/wte/kernel": (4, 4, 3, 12),
        "embed/wte/bias": (12,),
        "embed/wpe": (3, 3, 12),
        "embed/cls_token": (1, 1, 12),
        "norm/scale": (12,),
        "norm/bias": (12,),
        "head/kernel": (12, 5),
        "head/bias": (5,),
    }
    for i in range(2):
        for name in ("wq", "wk", "wv"):
            shapes |= {f"layer_{i}/attn/{name}/kernel": (12, 3, 4)}
            shapes |= {f"layer_{i}/attn/{name}/bias": (3, 4)}
        shapes |= {f"layer_{i}/attn/wo/kernel": (3, 4, 12), f"layer_{i}/attn/wo/bias": (12,)}
        shapes |= {f"layer_{i}/ff/w1/kernel": (12, 48), f"layer_{i}/ff/w1/bias": (48,)}
        shapes |= {f"layer_{i}/ff/w2/kernel": (48, 12), f"layer_{i}/ff/w2/bias": (12,)}
        shapes |= {f"layer_{i}/norm{n}/{x}": (12,) for n in (1, 2) for x in ("scale", "bias")}
        shapes |= {f"layer_{i}/scale{n}": (12,) for n in (1, 2)} if scaled else {}
    rng = np.random.default_rng(0)
    return {f"model/{k}": rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}


def answer(p: dict[str, np.ndarray], images: np.ndarray) -> np.ndarray:
    """What deit3-jax computes, step by step."""
    p = {key.removeprefix("model/"): jnp.asarray(array) for key, array in p.items()}

    def norm(name, x):
        mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return (x - mean) / jnp.sqrt(variance + 1e-6) * p[f"{name}/scale"] + p[f"{name}/bias"]

    n, side, d = len(images), 3, 12
    patches = images.reshape(n, side, 4, side, 4, 3).transpose(0, 1, 3, 2, 4, 5)
    x = patches.reshape(n, side, side, -1) @ p["embed/wte/kernel"].reshape(-1, d)
    x = (x + p["embed/wte/bias"] + p["embed/wpe"]).reshape(n, -1, d)
    x = jnp.concatenate([jnp.repeat(p["embed/cls_token"], n, axis=0), x], axis=1)
    for i in range(2):
        layer = f"layer_{i}"
        y = norm(f"{layer}/norm1", x)
        q, k, v = (
            jnp.einsum("ntd,dhk->nthk", y, p[f"{layer}/attn/{w}/kernel"])
            + p[f"{layer}/attn/{w}/bias"]
            for w in ("wq", "wk", "wv")
        )
        weights = jax.nn.softmax(jnp.einsum("nqhk,nshk->nhqs", q / 2, k))
        y = jnp.einsum("nhqs,nshk->nqhk", weights, v)
        y = jnp.einsum("nqhk,hkd->nqd", y, p[f"{layer}/attn/wo/kernel"])
        x = x + p.get(f"{layer}/scale1", 1) * (y + p[f"{layer}/attn/wo/bias"])
        y = norm(f"{layer}/norm2", x) @ p[f"{layer}/ff/w1/kernel"] + p[f"{layer}/ff/w1/bias"]
        y = jax.nn.gelu(y) @ p[f"{layer}/ff/w2/kernel"] + p[f"{layer}/ff/w2/bias"]
        x = x + p.get(f"{layer}/scale2", 1) * y
    return np.asarray(norm("norm", x)[:, 0] @ p["head/kernel"] + p["head/bias"])


@pytest.mark.parametrize("scaled", [False, True])
def test_deit3_jax_computes_the_same(scaled, tmp_path, caplog, capsys):
    arrays = deit3_jax(scaled)
    path = save(tmp_path / "deit3-s16.msgpack", arrays)

    vit = load(path)

    images = np.random.default_rng(1).normal(size=(2, 12, 12, 3)).astype(np.float32)
    with jax.default_matmul_precision("highest"):
        close(vit(images), answer(arrays, images))
    assert "no array tells" not in caplog.text
    assert vit.spec.drop_path_mode == "constant"
    resized, values = vit.preprocess.split("|")[0], vit.preprocess.split("|")[-1]
    assert resized == f"resize_small({12 if scaled else 13}, method='pil_bicubic')"
    assert values == "normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))"
    vit.save(tmp_path / "mine.npz")
    again = load(tmp_path / "mine.npz")
    assert (again.spec, again.preprocess) == (vit.spec, vit.preprocess)
    assert main(["info", str(path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["key_style"] == "deit3-jax, top-level positions"
    assert facts["kind"] == "Flax's .msgpack"


def test_damaged_files_are_one_line(tmp_path):
    path = save(tmp_path / "w.msgpack", deit3_jax(False))
    whole = path.read_bytes()
    for content in (
        whole[:-100],
        whole + b"\0",
        b"\x81\xc0\xc0",
        b"\xdf\xff\xff\xff\xff",
        b"\x81" * 5000,
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"w\.msgpack can't be read \([^\n]*\): the file is"):
            load(path)
    for shape, dtype in [
        ((1 << 40,), "float32"),
        ((1,), "object"),
        ((-1, -1), "float32"),
        ((1,), "x"),
    ]:
        array = msgpack.packb((shape, dtype, b"1234"))
        path.write_bytes(msgpack.packb({"a": msgpack.ExtType(1, array)}))
        with pytest.raises(UserError, match=r"w\.msgpack can't be read \([^\n]*\): the file is"):
            load(path)
    path.write_bytes(b"\x93\1\2\3")
    with pytest.raises(UserError, match="holds no weights: expected an"):
        load(path)
    odd = {"model/a": 3, "model/b": "text", "model/embed/wte/kernel": np.zeros(3)}
    with pytest.raises(UserError, match=r"w\.msgpack"):
        load(save(path, odd))
    assert container(path) == "Flax's .msgpack"
    with open_arrays(path) as arrays:
        assert [*arrays] == ["model/embed/wte/kernel"]


@pytest.fixture(params=["msgpack", "Orbax"])
def original(request, tmp_path):
    """(workdir, network): what the original's training saves, as Flax does by default or did."""
    vit = families.make("MAP", tmp_path)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(optax.constant_schedule(0.1)))
    state = optimizer.init(vit.params), optax.trace(0.9).init(vit.params)
    before = flax.config.flax_use_orbax_checkpointing
    flax.config.update("flax_use_orbax_checkpointing", request.param == "Orbax")
    try:
        for step in (9, 10):
            save_checkpoint(tmp_path / "run", (vit.params, state, step), step, keep=9)
    finally:
        flax.config.update("flax_use_orbax_checkpointing", before)
    assert (tmp_path / "run" / "checkpoint_9").is_dir() == (request.param == "Orbax")
    return tmp_path / "run", vit


def test_a_checkpoint_of_the_originals_training_is_loaded_without_its_optimizer(original, caplog):
    workdir, vit = original
    for path in (workdir / "checkpoint_9", workdir.with_name("mine")):
        if path.name == "mine":
            (workdir / "checkpoint_9").rename(path)
        found = load(path)
        assert found.spec.num_classes == vit.spec.num_classes
        jax.tree.map(np.testing.assert_array_equal, found.params, vit.params)
    assert "are taken, those of the network; left out: 1" in caplog.text


def test_of_a_workdir_of_the_originals_training_the_last_checkpoint_is_loaded(original, caplog):
    workdir, vit = original
    jax.tree.map(np.testing.assert_array_equal, load(workdir).params, vit.params)
    assert "run: its last checkpoint is taken, checkpoint_10" in caplog.text
