"""Small things in place of what the notebooks would download: images, weights, tables.

Everything is drawn or trained here, from seeds, in seconds. The files have the layouts of the real
ones, so that the notebooks read them with the same lines of code.
"""

import csv
import itertools
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import optax

import vit_jax
from vit_jax import data, tokenizers, training
from vit_jax.checkpoints import hub
from vit_jax.models import LiT, Spec
from vit_jax.pretrained import PretrainedLiT

COLOURS = {
    "red": (225, 50, 40),
    "green": (60, 180, 70),
    "blue": (50, 90, 230),
    "yellow": (240, 210, 50),
    "pink": (240, 110, 200),
    "white": (245, 245, 245),
}
# Whether points are painted; x to the right and y down, in stripes of width 1.
PATTERNS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "plain": lambda x, y: x == x,
    "striped": lambda x, y: y % 2 < 1,
    "barred": lambda x, y: x % 2 < 1,
    "checked": lambda x, y: (x // 1 + y // 1) % 2 < 1,
}


EVERY = [f"{colour} {pattern}" for colour in COLOURS for pattern in PATTERNS]
KNOWN = [name for name in EVERY if name.startswith(("red", "blue", "white"))]
NEW = ("green barred", "green plain", "yellow barred", "yellow checked")  # What `photos` are of.
SIZE = 48  # Height and width in pixels of what the networks see.


def draw(name: str, rng: np.random.Generator, size: tuple[int, int] = (72, 96)) -> np.ndarray:
    """An image of a disc before a dim, blotched ground.

    Args:
      name: its colour and pattern, e.g. "red striped".
      size: height and width in pixels.

    Returns:
      uint8 (height, width, 3).
    """
    colour, pattern = name.split()
    height, width = size
    radius = rng.uniform(0.24, 0.36) * min(size)
    row, column = (rng.uniform(radius, length - radius) for length in size)
    # Four points a pixel, whose mean gives smooth edges.
    y, x = (np.mgrid[: 2 * height, : 2 * width] + 0.5) / 2
    disc = np.hypot(x - column, y - row) < radius
    paint = PATTERNS[pattern]((x - column) * 9 / min(size), (y - row) * 9 / min(size))
    disc, paint = (
        mask.reshape(height, 2, width, 2).mean(axis=(1, 3))[..., None] for mask in (disc, paint)
    )
    blotches = data.parse(f"resize(({height}, {width}))")(
        rng.integers(40, 90, (4, 5, 3), np.uint8), rng
    )
    filled = paint * np.array(COLOURS[colour]) + (1 - paint) * 20
    image = disc * filled + (1 - disc) * blotches
    return image.astype(np.uint8)


def discs(
    names: Sequence[str], count: int, seed: int, **kwargs: tuple[int, int]
) -> tuple[np.ndarray, list[str]]:
    """(images, their names), `count` of each name."""
    rng = np.random.default_rng(seed)
    labels = [name for name in names for _ in range(count)]
    return np.stack([draw(label, rng, **kwargs) for label in labels]), labels


def photos(folder: Path, names: Sequence[str] = NEW, **counts: int) -> None:
    """Files FOLDER/SPLIT/NAME/NUMBER.png, `counts` of each name and split."""
    for seed, (split, count) in enumerate(counts.items()):
        images, labels = discs(names, count, seed + 100)
        for number, (image, name) in enumerate(zip(images, labels, strict=True)):
            path = Path(folder) / split / name / f"{number:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), image[..., ::-1])


def weights(
    path: Path,
    *,
    names: Sequence[str] = KNOWN,
    steps: int = 250,
    hidden_size: int = 48,
    size: int = SIZE,
    model: dict[str, Any] | None = None,
) -> None:
    """Trains a small ViT, or another network of images of a size, to tell discs by their names, and
    saves it in the official layout."""
    config = training.default_config()
    vit = dict(name="ViT-Ti_16", patch_size=(6, 6), hidden_size=hidden_size)
    vit |= dict(num_layers=3, num_heads=4, mlp_dim=2 * hidden_size)
    config.model.update(model or vit)
    config.update(optim="adamw", base_lr=2e-3, weight_decay=0.1, total_steps=steps)
    config.update(warmup_steps=steps // 10, batch=32, accum_steps=1, batch_eval=60)
    config.update(progress_every=steps, eval_every=0, checkpoint_every=0)
    config.pp.train = config.pp.eval = f"resize({size})|value_range(-1, 1)"
    train, test = (
        data.from_arrays(*discs(names, count, seed), name="discs")
        for seed, count in enumerate((100, 5))
    )
    workdir = Path(path).with_suffix(".run")
    training.run(config, workdir, sources=(train, test))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    vit_jax.load(workdir).save(path)


def augreg(cache: Path) -> None:
    """A cache with AugReg's table, made small and WITH INVENTED FIGURES, and files named in it.

    All files of a model hold the same small network, trained on the discs.
    """
    rng = np.random.default_rng(0)
    models = {"Ti": (5.7, 2000, 0.0, 24), "S": (22.0, 900, 0.05, 48), "B": (86.6, 300, 0.08, 96)}
    rows = []
    for size, (millions, speed, gain, hidden_size) in models.items():
        file = Path(cache) / f"{size}.npz"
        weights(file, steps=100, hidden_size=hidden_size)
        settings = itertools.product(("i1k", "i21k"), ("none", "light1", "medium2"), (0.03, 0.1))
        for ds, aug, wd in settings:
            name = f"{size}_16-{ds}-300ep-lr_0.001-aug_{aug}-wd_{wd}-do_0.0-sd_0.0"
            first = 0.35 + gain + 0.03 * (ds == "i21k") + rng.normal(0, 0.015)
            pretraining = dict(
                name=f"{size}/16", ds=ds, lr=0.001, aug=aug, wd=wd, do=0.0, sd=0.0
            ) | dict(best_val=first, final_val=first, final_test=first)
            for adapt, resolution in itertools.product(("imagenet2012", "cifar100"), (224, 384)):
                adapted = f"{name}--{adapt}-steps_20k-lr_0.03-res_{resolution}"
                score = 0.34 + first + 0.03 * (resolution == 384) + rng.normal(0, 0.005)
                rows.append(
                    pretraining
                    | dict(adapt_ds=adapt, adapt_lr=0.03, adapt_steps=20_000)
                    | dict(adapt_resolution=resolution, params=int(1e6 * millions))
                    | dict(adapt_final_val=score, adapt_final_test=score)
                    | dict(infer_samples_per_sec=speed / (resolution / 224) ** 2)
                    | dict(filename=name, adapt_filename=adapted)
                )
                for suffix in (".npz", ".json"):
                    url = f"{hub.STORE}/vit_models/augreg/{adapted}{suffix}"
                    copy = hub.cache_path(url, cache)
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(file.with_suffix(suffix), copy)
    with open(hub.cache_path(hub.AUGREG_INDEX, cache), "w", newline="") as table:
        writer = csv.DictWriter(table, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def lit(path: Path, *, unseen: Sequence[str] = (), steps: int = 400) -> None:
    """Trains a small LiT bundle on discs and words that describe them, but for the `unseen` ones.

    As in arXiv:2111.07991 the image tower is trained first, on classes, and then locked: the text
    tower learns to describe what it sees. A step asks for colour, pattern or both of each image.
    """
    names = [name for name in EVERY if name not in unseen]
    words = ["[PAD]", "[UNK]", "[CLS]", "a", "photo", "of", "disc", ".", *COLOURS, *PATTERNS]
    vocabulary = Path(path).with_suffix(".txt")
    vocabulary.parent.mkdir(parents=True, exist_ok=True)
    vocabulary.write_text("\n".join(words) + "\n")
    tokenize = tokenizers.open_tokenizer(vocabulary)
    parts = [name.split() for name in names]
    # (texts, which of them is true of each name).
    questions = [
        (
            tokenize([template.format(text) for text in texts]),
            np.array([texts.index(x) for x in true]),
        )
        for texts, true in (
            (list(COLOURS), [colour for colour, _ in parts]),
            (list(PATTERNS), [pattern for _, pattern in parts]),
            (names, names),
        )
        for template in ("{}", "a {} disc", "a photo of a {}.")
    ]
    weights(Path(path).with_suffix(".img.npz"), names=EVERY, steps=300)
    tower = vit_jax.load(Path(path).with_suffix(".img.npz"))
    headless = tower.spec.replace(num_classes=None)
    locked = {key: value for key, value in tower.params.items() if key != "head"}
    images, labels = discs(names, 20, 2)
    ready = np.stack([data.parse(tower.preprocess)(image) for image in images])
    zimg = jax.jit(headless.model().apply)({"params": locked}, ready)
    zimg /= jnp.linalg.norm(zimg, axis=1, keepdims=True)
    row = np.array([names.index(label) for label in labels])

    width = headless.hidden_size
    text = dict(hidden_size=64, num_layers=1, num_heads=1, mlp_dim=128, vocab_size=len(words))
    image = {k: v for k, v in headless.architecture().items() if k != "num_classes"}
    model = LiT(image, "bert", text | dict(max_len=16), out_dim=(None, width))
    spec = Spec(model, headless.image_size, headless.channels)

    def loss(params, texts, true):
        _, ztxt, out = model.apply({"params": params}, tokens=texts)
        logits = out["t"] * zimg @ ztxt.T
        return optax.softmax_cross_entropy_with_integer_labels(logits, true).mean()

    @jax.jit
    def step(params, state, texts, true):
        updates, state = tx.update(jax.grad(loss)(params, texts, true), state, params)
        return optax.apply_updates(params, updates), state

    tx = optax.adamw(optax.warmup_cosine_decay_schedule(0, 2e-3, steps // 10, steps))
    params = model.init(jax.random.key(0), tokens=questions[0][0])["params"]
    params["t"] = jnp.log(jnp.full(1, 10.0))
    state = tx.init(params)
    for number in range(steps):
        texts, true = questions[number % len(questions)]
        params, state = step(params, state, texts, true[row])
    params = jax.device_get(params) | {"img": locked}
    PretrainedLiT(model, params, spec, None, tower.preprocess, vocabulary=vocabulary).save(path)
