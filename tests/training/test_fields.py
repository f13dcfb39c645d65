"""Every field of the configuration, set alone on the command line: it does what it says, or one
line says why not."""

import json
import math
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from tests.cli.conftest import write_images
from vit_jax.cli import main
from vit_jax.data import AUGREG
from vit_jax.training import default_config
from vit_jax.training.config import FIELDS as TABLE
from vit_jax.training.config import MODEL_SIZES, flatten, model_fields

PLAIN = Path(__file__).resolve().parent / "plain.py"


class Effect:
    """What a run leaves, compared with the run of the plain configuration."""

    def __init__(self, *, weights: bool, file: str = "", says: str = ""):
        self.weights = weights  # Whether others.
        self.file = file
        self.says = says


SAME, OTHER = Effect(weights=False), Effect(weights=True)


def leaves(file):
    return Effect(weights=False, file=file)


def says(text):
    return Effect(weights=False, says=text)


# Each field with texts of values, and what comes of them: an effect, or the words of a refusal.
# {photos}, {table} and {saved} are images and weights, {new} is nothing yet.
FIELDS: dict[str, dict[str, Effect | str]] = {
    "seed": {"1": OTHER, "0": SAME, "4294967295": OTHER},
    "model.name": {
        "ViT-S_16-gap-norep": OTHER,
        "ViT-mu_16": OTHER,
        "Mixer-B_16": OTHER,
        "R+ViT-Ti_16": OTHER,
        "Ti_16": SAME,
        "R50+ViT-B_16": "the image of 16x16 pixels is smaller than one patch of 64x64",
        "ViT-Ti_17": "unknown model 'ViT-Ti_17': did you mean ViT-Ti_16",
        "": "nothing to start from",
    },
    "model.dropout_rate": {"0.1": OTHER, "0.999": OTHER, "0": SAME},
    "model.attention_dropout_rate": {"0.1": OTHER, "0": SAME},
    "model.stochastic_depth_rate": {"0.999": OTHER, "0": SAME},
    "model.patch_size": {
        "(8, 4)": OTHER,
        "(3, 3)": OTHER,
        "(16, 16)": OTHER,
        "(32, 32)": "the image of 16x16 pixels is smaller than one patch of 32x32",
        "4": "config.model.patch_size is 4 of type int, expected tuple",
        "(0, 4)": "config.model.patch_size is (0, 4), expected height and width",
    },
    "model.hidden_size": {"96": OTHER, "1": "not divisible by num_heads 3"},
    "model.num_layers": {"1": OTHER, "2": SAME},
    "model.num_heads": {"1": OTHER, "6": OTHER, "5": "not divisible by num_heads 5"},
    "model.mlp_dim": {"1": OTHER},
    "model.classifier": {
        "token": SAME,
        "gap": OTHER,
        "map": OTHER,
        "first": OTHER,
        "unpooled": "config.model.classifier 'unpooled' gives no classes",
        "token_unpooled": "config.model.classifier 'token_unpooled' gives no classes",
        "token_gap": OTHER,
        "max": "classifier 'max'",
    },
    "model.representation_size": {"32": OTHER, "1": OTHER, "None": SAME},
    "model.head_bias_init": {
        "-10": OTHER,
        "1e999": "became",
        "nan": "config.model.head_bias_init is 'nan' of type str, expected float",
    },
    "model.position_embedding": {
        "learned": SAME,
        "sincos2d": OTHER,
        "none": "unknown position_embedding 'none'",
    },
    "model.position_resize": {"official": SAME, "near": "unknown position_resize 'near'"},
    "model.drop_path_mode": {"linear": SAME, "constant": SAME, "half": "drop_path_mode 'half'"},
    "model.cls_has_position": {"True": SAME, "False": OTHER},
    "model.unread_class_token": {"False": SAME, "True": "goes with classifier gap or map"},
    "model.distilled": {
        "none": SAME,
        "token": OTHER,
        "heads": OTHER,
        "two": "unknown distilled 'two', expected one of none, token, heads",
    },
    "model.fc_norm": {"False": SAME, "True": "fc_norm is True, which goes with classifier gap"},
    "model.mlp": {"gelu": SAME, "swiglu": OTHER, "relu": "unknown mlp 'relu'"},
    "model.activation": {
        "gelu_tanh": SAME,
        "gelu_erf": OTHER,
        "quick_gelu": OTHER,
        "relu": "unknown activation 'relu', expected one of gelu_tanh, gelu_erf, quick_gelu",
    },
    "model.layer_norm_epsilon": {
        "1e-6": SAME,
        "0.01": OTHER,
        "0.0": "layer_norm_epsilon is 0.0, expected a small number over 0",
    },
    "model.qkv_bias": {"True": SAME, "False": OTHER},
    "model.layer_scale": {"0.1": OTHER, "big": "config.model.layer_scale is 'big' of type str"},
    "model.num_registers": {
        "0": SAME,
        "2": OTHER,
        "-1": "num_registers is -1, expected at least 0",
    },
    "model.resnet": {
        "()": OTHER,
        "(1,)": OTHER,
        "(0,)": "expected the number of units of each stage, at least 1",
        "(3, 4, 9)": "the image of 16x16 pixels is smaller than one patch of 64x64",
        "None": "config.model.resnet is None of type NoneType, expected tuple",
    },
    # Of a Mixer.
    # Of Swin and T2T-ViT.
    **{
        f"model.{name}": {value: f"unknown field '{name}' of model ViT-Ti_16"}
        for name, value in {
            "depths": "(2, 2)",
            "heads": "(3, 6)",
            "mlp_ratio": "4.0",
            "pretrained_windows": "(0, 0)",
            "token_attention": "transformer",
            "version": "2",
            "window": "4",
        }.items()
    },
    "model.tokens_mlp_dim": {"8": "unknown field 'tokens_mlp_dim' of model ViT-Ti_16"},
    "model.channels_mlp_dim": {"8": "unknown field 'channels_mlp_dim' of model ViT-Ti_16"},
    "model_or_filename": {
        "{saved}/ViT-Ti_16.npz": OTHER,
        "{new}.npz": "no such file: {new}.npz",
    },
    "pretrained_dir": {"{saved}": OTHER, "{new}": "no weights at {new}/ViT-Ti_16.npz"},
    "dtype": {"float32": SAME, "bfloat16": OTHER},
    "dataset": {
        "digits": SAME,
        "{photos}": OTHER,
        "{table}": OTHER,
        "{new}": "{new}",
        "digitz": "digitz",
        "": "dataset",
    },
    # The digits are no TFDS data set.
    "tfds_data_dir": {"{new}": SAME},
    "tfds_manual_dir": {"{new}": SAME},
    "corrupt": {"error": SAME, "skip": SAME},
    "splits.train": {
        "train": SAME,
        "train[:50%]": OTHER,
        "train+test": OTHER,
        "tain": "tain",
        "train[:0]": "train[:0]",
    },
    "splits.test": {"test": SAME, "test[:7]": SAME, "train": SAME, "tst": "tst"},
    "pp.train": {
        "resize(16)|value_range(-1, 1)": OTHER,
        "resize(16)|value_range(0, 1)": "values from 0 to 1 and evaluation of values from -1 to 1",
        "resize(16)": "values from 0 to 255 and evaluation of values from -1 to 1",
        "resize(8)|value_range(-1, 1)": "config.pp.train and config.pp.eval the same size",
        "rezise(16)": "resize",
        "train[:50%]": OTHER,
    },
    "pp.eval": {
        "resize(16)|value_range(-1, 1)": SAME,
        "resize(16)": "values from -1 to 1 and evaluation of values from 0 to 255",
        "resize(8)|value_range(-1, 1)": "config.pp.train and config.pp.eval the same size",
        "rezise(16)": "resize",
    },
    "pp.crop": {
        "8": OTHER,
        "12": OTHER,
        "1": "the image of 1x1 pixels is smaller than one patch of 4x4",
    },
    "pp.resize": {"0": SAME, "20": SAME, "8": "config.pp.resize 8 is less than config.pp.crop 16"},
    "levels": {
        "full": SAME,
        "10, 200": OTHER,
        "percentile": OTHER,
        "12 bit": "whose values end at 255, expected values of up to 4,095",
        "all": "config.levels is 'all', expected full",
    },
    "augment": {name: SAME if name == "none" else OTHER for name in AUGREG},
    "mixup": {"0": SAME, "0.2": OTHER, "1e-30": SAME, "1e30": OTHER},
    "cutmix": {"0": SAME, "1.0": OTHER, "1e30": OTHER},
    "total_steps": {"1": OTHER, "3": OTHER},
    "batch": {
        "8": OTHER,
        "1440": OTHER,  # More than there are.
        "12": "config.batch 12 is not divisible by config.accum_steps 8",
        "1": "config.batch 1 is not divisible by config.accum_steps 8",
    },
    "batch_eval": {"7": SAME, "360": SAME, "1": SAME},
    "accum_steps": {
        "1": SAME,
        "16": SAME,
        "3": "config.batch 16 is not divisible by config.accum_steps 3",
        "32": "config.batch 16 is not divisible by config.accum_steps 32",
    },
    "sharding": dict.fromkeys(TABLE["sharding"].values, SAME),
    "compile": {"jit": SAME, "pmap": SAME},
    "compile_cache": {
        "off": says("compiled programs are not kept"),
        "{new}": says("compiled programs are in {new}"),
        "{table}": says("compiled programs are not kept: {table} can't be written"),
    },
    "scan_layers": {"true": SAME, "false": SAME, "maybe": "config.scan_layers is 'maybe'"},
    "remat": dict.fromkeys(TABLE["remat"].values, SAME),
    "attention": {"auto": SAME, "xla": SAME, "cudnn": "config.attention is cudnn, but "},
    "optim": {"sgd": SAME, "adamw": OTHER},
    "momentum": {"0": OTHER, "0.999": OTHER},
    "optim_dtype": {"bfloat16": SAME, "float32": OTHER},
    "b1": {"0": says("no effect has config.b1 0.0 (config.optim is sgd)"), "0.9": SAME},
    "b2": {"0": says("no effect has config.b2 0.0 (config.optim is sgd)"), "0.999": SAME},
    "weight_decay": {"0": SAME, "0.1": OTHER},
    "base_lr": {"0": OTHER, "1": OTHER, "1e30": "became inf"},
    "decay_type": {
        name: SAME if name == "cosine" else OTHER for name in TABLE["decay_type"].values
    },
    "warmup_steps": {
        "0": SAME,
        "1": OTHER,
        "2": OTHER,
        "3": "config.warmup_steps 3 is more than config.total_steps 2",
    },
    "grad_norm_clip": {"0": OTHER, "0.1": OTHER, "1e-30": OTHER, "1e30": OTHER},
    "loss": {"softmax": SAME, "sigmoid": OTHER},
    "label_smoothing": {"0": SAME, "0.1": OTHER, "0.999": OTHER},
    "ema_decay": {"0": SAME, "0.5": OTHER, "0.999": OTHER},
    "progress_every": {"1": SAME, "1000": SAME},
    "eval_every": {"0": SAME, "1": SAME},
    "checkpoint_every": {"0": SAME, "1": leaves("checkpoints/1")},
    "keep_checkpoints": {"1": SAME, "100": SAME},
    "keep_best": {"true": leaves("weights_best.npz"), "false": SAME},
    "profile": {
        "()": SAME,
        "(0, 1)": leaves("profile"),
        "(1, 5)": leaves("profile"),
        "(2, 3)": "config.profile (2, 3) begins after the last of config.total_steps 2",
        "(1, 1)": "config.profile is (1, 1), expected the steps (start, stop)",
        "(1,)": "config.profile is (1,), expected the steps (start, stop)",
    },
    "prefetch": {"1": SAME, "50": SAME},
    "threads": {"0": SAME, "1": SAME, "3": SAME},
    "workers": {"-1": SAME, "0": SAME, "2": SAME},
    "image_dtype": {"uint8": SAME, "float32": OTHER},
    "on_bad_step": dict.fromkeys(TABLE["on_bad_step"].values, SAME),
    "spike": {"0": SAME, "10": SAME, "1": "config.spike is 1.0, and a usual gradient is 1 times"},
    "silence_timeout": {"1": SAME, "599.9": SAME},
}
# Those that crashed once, and one of each kind.
FAST = {("mixup", "0.2"), ("cutmix", "1.0"), ("augment", "light2"), ("dtype", "bfloat16")}
FAST |= {("model.patch_size", "(32, 32)"), ("keep_best", "true"), ("base_lr", "1e30")}


def run(workdir: Path, *options: str) -> int:
    return main(["train", f"--config={PLAIN}", f"--workdir={workdir}", *options])


@pytest.fixture(autouse=True)
def _own_compile_cache():
    folder = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", folder)
    compilation_cache.reset_cache()  # JAX looks at the setting once.


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """The workdir of the plain configuration's run, beside {photos}, {table} and {saved}."""
    folder = tmp_path_factory.mktemp("fields")
    assert run(folder / "plain") == 0
    photos = write_images(folder / "photos", 20)
    rows = [f"{p},{p.parent.name}" for p in sorted(photos.rglob("*.jpg"))]
    (folder / "table.csv").write_text("\n".join(["path,label", *rows]) + "\n")
    (folder / "saved").mkdir()
    shutil.copy(folder / "plain" / "weights.npz", folder / "saved" / "ViT-Ti_16.npz")
    return folder / "plain"


def figures(workdir: Path) -> list[dict]:
    """The training metrics, without times."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").open()]
    return [{k: v for k, v in line.items() if k.startswith("train/")} for line in lines]


def change(workdir: Path, plain: Path) -> float:
    """The largest difference between what two runs learnt, as a share of what one learnt."""
    with np.load(workdir / "weights.npz") as found, np.load(plain / "weights.npz") as expected:
        if {k: found[k].shape for k in found} != {k: expected[k].shape for k in expected}:
            return math.inf
        # The head begins with zeros.
        learnt = max(np.abs(expected[k]).max() for k in expected if k.startswith("head/"))
        return max(np.abs(found[k] - expected[k]).max() for k in expected) / learnt


def test_the_table_has_every_field_and_every_choice():
    known = {name.removeprefix("config.") for name in flatten(default_config())}
    assert FIELDS.keys() == known | {f"model.{name}" for name in model_fields()}
    for field in TABLE.values():
        if field.values and isinstance(field.default, str):
            assert FIELDS[field.name].keys() == set(field.values)
    assert all(value in FIELDS[field] for field, value in FAST)


def rows():
    for field, values in FIELDS.items():
        for value in values:
            marks = () if (field, value) in FAST else (pytest.mark.slow, pytest.mark.ci)
            yield pytest.param(field, value, marks=marks, id=f"{field}={value}")


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.usefixtures("no_image")
@pytest.mark.parametrize(("field", "value"), [*rows()])
def test_a_field_set_alone_trains_or_is_refused_in_one_line(field, value, plain, tmp_path, capfd):
    names = dict(photos=plain.parent / "photos", table=plain.parent / "table.csv")
    names |= dict(saved=plain.parent / "saved", new=tmp_path / "new")

    def filled(text):
        for name, path in names.items():
            text = text.replace(f"{{{name}}}", str(path))
        return text

    expected = FIELDS[field][value]
    capfd.readouterr()
    status = run(tmp_path / "run", f"--config.{field}={filled(value)}")
    out = capfd.readouterr()

    assert "Traceback" not in out.err
    if isinstance(expected, str):
        assert status == 2, out.err
        lines = [line for line in out.err.splitlines() if line.startswith("vit-jax: ")]
        assert lines == out.err.splitlines()[-1:]
        assert filled(expected) in lines[0]
        return
    assert status == 0, out.err
    difference = change(tmp_path / "run", plain)
    if expected.weights:
        assert difference > 0 or figures(tmp_path / "run") != figures(plain)
    else:  # To what rounding does to a momentum in bfloat16.
        assert difference < 2**-7
    assert (tmp_path / "run" / expected.file).exists()
    assert filled(expected.says) in out.err


def beyond():
    """Numbers that a field may not have."""
    numbers = (f for f in TABLE.values() if f.values and not isinstance(f.default, str))
    limits = {field.name: field.values for field in numbers}
    for field, (least, bound) in (limits | dict.fromkeys(MODEL_SIZES, (1, math.inf))).items():
        yield field, str(least - 1)
        yield field, "1e999" if bound == math.inf else str(bound)
        yield field, "nan"


@pytest.mark.parametrize(("field", "value"), [*beyond()])
def test_a_number_beyond_its_limits_is_refused_in_one_line(field, value, tmp_path, capfd):
    assert run(tmp_path / "run", f"--config.{field}={value}") == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"vit-jax: config.{field} is ")
    assert not (tmp_path / "run").exists()


def no_texts():
    flat = flatten(default_config()) | {f"config.model.{k}": v for k, v in model_fields().items()}
    return [name.removeprefix("config.") for name, x in flat.items() if not isinstance(x, str)]


@pytest.mark.parametrize("field", no_texts())
def test_a_value_of_another_type_is_refused_in_one_line(field, tmp_path, capfd):
    assert run(tmp_path / "run", f"--config.{field}={{}}") == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"vit-jax: config.{field} is ")
