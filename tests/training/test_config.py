"""Configurations: what a person mistypes is named, what is right comes through unchanged."""

import subprocess
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from vit_jax.data import AUGREG
from vit_jax.errors import UserError
from vit_jax.models.kernels import ATTENTION
from vit_jax.models.stack import REMAT
from vit_jax.sharding import SHARDINGS
from vit_jax.training import check_config, default_config
from vit_jax.training.config import (
    FIELDS,
    config_from_json,
    config_to_json,
    differing_fields,
    eval_spec,
    flatten,
    mixup,
    train_spec,
    weights_source,
    without_effect,
)
from vit_jax.training.options import find_config_file, load_config, override

DOCS = Path(__file__).resolve().parents[2] / "docs" / "training.md"


def table_of_fields() -> str:
    """The table in docs/training.md."""
    rows = ["| field | default | values | a run may go on with another | what |"]
    rows.append("|---|---|---|---|---|")
    changes = {"": "", "run": "yes", "process": "yes, in each process"}
    for field in FIELDS.values():
        default = repr(field.default).replace("'", '"')
        cells = f"`{field.name}`", f"`{default}`", field.expected, changes[field.changes]
        rows.append(f"| {' | '.join((*cells, field.help))} |")
    return "\n".join(rows)


def test_the_documentation_lists_the_fields():
    """After a change of FIELDS: `python -c "from tests.training.test_config import
    table_of_fields as t; print(t())"` prints what belongs there."""
    assert f"\n\n{table_of_fields()}\n\n" in DOCS.read_text()


def test_help_lists_the_fields_and_imports_nothing_slow():
    program = "import sys; from vit_jax.cli import main; main(['train', '--help'])"
    slow = "; print([m for m in ('jax', 'flax', 'numpy') if m in sys.modules], file=sys.stderr)"
    program = program.replace("main([", "\ntry: main([") + f"\nfinally: {slow[2:]}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stderr == "[]\n"
    for field in FIELDS.values():
        assert f"\n  {field.name} " in done.stdout
        assert field.help in done.stdout


def test_choices_are_those_that_the_library_knows():
    assert FIELDS["sharding"].values == SHARDINGS
    assert FIELDS["remat"].values == tuple(REMAT)
    assert FIELDS["attention"].values == ("auto", *ATTENTION)
    assert FIELDS["augment"].values == tuple(AUGREG)


def changed(*options):
    return override(default_config(), options)


def test_a_configuration_that_says_nothing_is_the_default():
    assert check_config(ConfigDict()) == default_config() == changed()


def test_options_set_fields_at_any_depth_in_both_spellings():
    config = changed("--config.pp.crop=384", "--config.batch", "64", "--config.keep_best")
    assert (config.pp.crop, config.batch, config.keep_best) == (384, 64, True)
    assert changed("--config.base_lr=1").base_lr == 1.0


def test_a_value_may_hold_an_equals_sign_or_start_with_a_dash():
    assert changed("--config.dataset=/data/a=b").dataset == "/data/a=b"
    with pytest.raises(UserError, match=r"config\.base_lr is -0\.1, expected at least 0"):
        changed("--config.base_lr", "-0.1")


@pytest.mark.parametrize(
    ("options", "value"),
    [
        (["--config.keep_best=false"], False),
        (["--config.keep_best", "false"], False),
        (["--config.keep_best", "True"], True),
        (["--config.keep_best=1"], True),
        (["--config.keep_best"], True),
        (["--config.keep_best", "--config.batch=8"], True),
        (["--noconfig.keep_best"], False),
        (["--config.keep_best=false", "--config.keep_best"], True),
    ],
)
def test_true_and_false_in_every_spelling(options, value):
    config = default_config()
    config.keep_best = not value
    assert override(config, options).keep_best is value


def test_a_shorter_run_has_a_shorter_warm_up():
    assert changed("--config.total_steps=50").warmup_steps == 50
    assert changed("--config.total_steps=5000").warmup_steps == 500
    with pytest.raises(UserError, match=r"warmup_steps 60 is more than config\.total_steps 50"):
        changed("--config.total_steps=50", "--config.warmup_steps=60")


def test_local_paths_are_noted_absolute_and_names_are_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("photos", "digits", "models"):
        (tmp_path / folder).mkdir()
    (tmp_path / "w.npz").touch()
    (tmp_path / "models" / "ViT-S_16.npz").touch()
    config = changed("--config.dataset=photos", "--config.model_or_filename=w.npz")
    assert config.dataset == f"{tmp_path}/photos"
    assert config.model_or_filename == f"{tmp_path}/w.npz"
    assert changed("--config.model_or_filename=./w.npz:img").model_or_filename.endswith("w.npz:img")
    assert changed("--config.dataset=digits").dataset == "digits"
    assert weights_source(changed("--config.model_or_filename=augreg/B_16")) == "augreg/B_16"
    named = changed("--config.model.name=ViT-S_16", "--config.pretrained_dir=models")
    assert weights_source(named) == f"{tmp_path}/models/ViT-S_16.npz"
    monkeypatch.chdir("/")
    assert differing_fields(check_config(named), named) == []


def test_weights_may_lie_in_a_bucket_as_the_originals_do():
    bucket = "--config.pretrained_dir=gs://vit_models/imagenet21k/"
    config = changed("--config.model.name=ViT-B_16", bucket)
    assert weights_source(config) == "gs://vit_models/imagenet21k/ViT-B_16.npz"
    assert weights_source(changed()) is None


def test_options_set_fields_of_the_network_that_the_file_leaves_to_the_model():
    config = changed(
        "--config.model.classifier=gap",
        "--config.model.patch_size=(8,4)",
        "--config.model.representation_size=32",
        "--config.model.head_bias_init=-10",
    )
    assert config.model.classifier == "gap"
    assert config.model.patch_size == (8, 4)
    assert config.model.representation_size == 32
    assert config.model.head_bias_init == -10.0
    assert "mlp_dim" not in config.model


@pytest.mark.parametrize(
    ("option", "path", "nearest"),
    [
        ("--config.toal_steps=1", "config.toal_steps", "config.total_steps"),
        ("--config.crop=1", "config.crop", "config.pp.crop"),
        ("--config.pp.crp=1", "config.pp.crp", "config.pp.crop"),
        ("--config.model.num_layer=1", "config.model.num_layer", "config.model.num_layers"),
        ("--config.model.clasifier=gap", "config.model.clasifier", "config.model.classifier"),
        ("--config.model.num_classes=3", "config.model.num_classes", "config.model.num_layers"),
        ("--config.lr=1", "config.lr", "config.base_lr"),
        ("--config.leraning_rate=1", "config.leraning_rate", "config.base_lr"),
        ("--config.batch_size=1", "config.batch_size", "config.batch"),
        ("--config.epochs=1", "config.epochs", "config.total_steps"),
    ],
)
def test_a_misspelt_field_is_named_in_full_with_the_nearest_one(option, path, nearest):
    with pytest.raises(UserError) as error:
        changed(option)
    assert str(error.value).startswith(f"unknown field {path}: did you mean ")
    assert nearest in str(error.value)


def test_a_misspelt_field_in_a_file_is_named_too():
    config = default_config()
    config.pp.resise = 3
    with pytest.raises(UserError, match=r"unknown field config\.pp\.resise: did you mean config"):
        check_config(config)
    with pytest.raises(UserError, match=r"there is no config\.shuffle_buffer: .* leave it out"):
        changed("--config.shuffle_buffer=9")
    with pytest.raises(UserError, match=r"unknown field config\.qqqq: often set are config\.base"):
        check_config(ConfigDict({"qqqq": 1}))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("batch", "12", "config.batch is '12' of type str, expected int"),
        ("batch", 1.5, "config.batch is 1.5 of type float, expected int"),
        ("batch", True, "config.batch is True of type bool, expected int"),
        ("base_lr", "high", "config.base_lr is 'high' of type str, expected float"),
        ("keep_best", 1, "config.keep_best is 1 of type int, expected bool"),
        ("pp", 3, "config.pp is 3, expected fields: "),
        ("batch", 0, "config.batch is 0, expected at least 1"),
        ("total_steps", -5, "config.total_steps is -5, expected at least 1"),
        ("seed", -1, "config.seed is -1, expected 0 <= value < 4294967296"),
        ("seed", 2**32, "config.seed is 4294967296, expected 0 <= value < 4294967296"),
        ("base_lr", float("nan"), "config.base_lr is nan, expected at least 0"),
        ("grad_norm_clip", -1.0, "config.grad_norm_clip is -1.0, expected at least 0"),
        ("keep_checkpoints", 0, "config.keep_checkpoints is 0, expected at least 1"),
        ("label_smoothing", 1.0, "config.label_smoothing is 1.0, expected 0 <= value < 1"),
        ("ema_decay", 1.0, "config.ema_decay is 1.0, expected 0 <= value < 1"),
        ("momentum", 1.0, "config.momentum is 1.0, expected 0 <= value < 1"),
        ("optim", "adam", "config.optim is 'adam', expected one of sgd, adamw"),
        ("accum_steps", 7, "config.batch 512 is not divisible by config.accum_steps 7"),
        ("spike", 0.5, "config.spike is 0.5, and a usual gradient is 1 times"),
        ("profile", (10_000, 10_002), "config.profile (10000, 10002) begins after the last of"),
        ("warmup_steps", 20_000, "config.warmup_steps 20000 is more than config.total_steps"),
        ("model.dropout_rate", 1.5, "config.model.dropout_rate is 1.5, expected 0 <= value < 1"),
        ("model.num_layers", 0, "config.model.num_layers is 0, expected at least 1"),
        ("model.num_layers", "4", "config.model.num_layers is '4' of type str, expected int"),
        ("model.patch_size", (3,), "config.model.patch_size is (3,), expected height and width"),
        ("model.representation_size", 0, "config.model.representation_size is 0, expected at"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_expected(field, value, message):
    config = ConfigDict(default_config().to_dict(), type_safe=False)
    *folders, name = field.split(".")
    part = config
    for folder in folders:
        part = part[folder]
    part[name] = value
    with pytest.raises(UserError) as error:
        check_config(config)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "option",
    [
        "--config.total_steps=many",
        "--config.total_steps=1.5",
        "--config.keep_best=maybe",
        "--config.pp=3",
        "--config.momentum",
        "--config.model.patch_size=x",
    ],
)
def test_an_option_of_the_wrong_type_names_its_field(option):
    with pytest.raises(UserError) as error:
        changed(option)
    assert option.lstrip("-").partition("=")[0] in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options", [["--total_steps=5"], ["--config.batch=8", "digits"], ["junk"], ["-x"]]
)
def test_what_is_no_field_is_refused(options):
    with pytest.raises(UserError, match=r"unknown option .*--config\.field=value"):
        changed(*options)


def test_a_configuration_survives_json():
    config = changed("--config.model.patch_size=(4,2)", "--config.base_lr=0.1")
    again = config_from_json(config_to_json(config))
    assert again == config
    assert again.model.patch_size == (4, 2)
    assert differing_fields(config, again) == []


def test_differing_fields_are_those_that_change_what_is_computed():
    config = changed("--config.prefetch=7", "--config.corrupt=skip", "--config.pp.crop=32")
    assert differing_fields(default_config(), config) == ["config.pp.crop 224 -> 32"]


def test_files_are_found_by_path_and_the_packages_own_by_name(tmp_path):
    assert find_config_file("digits").name == "digits.py"
    own = tmp_path / "mine.py"
    own.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config(arg):\n    return ConfigDict({'dataset': arg})\n"
    )
    assert find_config_file(str(own)) == own
    assert load_config(f"{own}:a,b:c").dataset == "a,b:c"
    for name in ("vit", "vit.py", "configs/vit.py"):
        assert find_config_file(name).name == "vit.py"
    for name in ("mine/vit.py", "../configs/vit.py", "vit.txt", "configs/vit", str(tmp_path)):
        with pytest.raises(UserError, match=f"no configuration file {name}: give the path of a"):
            find_config_file(name)
    with pytest.raises(UserError, match="no configuration file nothing: give the path"):
        find_config_file("nothing")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\ndef get_config(:", ", line 2: SyntaxError: invalid syntax"),
        ("import no_such_module", ", line 1: ModuleNotFoundError: No module named 'no_such_mod"),
        ("x = 1", "is no configuration file: it has no function get_config"),
        ("\n\nraise ValueError('a\\nb')", ", line 3: ValueError: a b"),
        ("def get_config(arg):\n    return {}[arg]", ", line 2: KeyError: ''"),
        ("def get_config(arg):\n    return int('x')", ", line 2: ValueError: invalid literal"),
        ("def get_config():\n    return 1", ": TypeError: get_config() takes 0 positional"),
        ("import sys\ndef get_config(arg):\n    sys.exit(3)", ", line 3: SystemExit: 3"),
        ("def get_config(arg):\n    return {}", "returns dict, expected a ConfigDict"),
    ],
)
def test_a_mistake_in_a_configuration_file_is_named_in_one_line(
    tmp_path, monkeypatch, text, message
):
    (tmp_path / "bad.py").write_text(text + "\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        load_config("bad.py")
    assert "bad.py" in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


# Splits and operations.


@pytest.mark.parametrize(
    ("field", "value", "moved"),
    [
        ("pp.train", "train[:98%]", "splits.train"),
        ("pp.train", " train[:10%] + train[90%:] ", "splits.train"),
        ("pp.test", "validation", "splits.test"),
        ("pp.train", "even_splits(train[:50%], 4)[0]+train[90%:]", "splits.train"),
        ("pp.train", "flip", None),
        ("pp.train", "resize(8)|flip", None),
        ("pp.eval", "rgb", None),
    ],
)
def test_a_split_where_the_original_has_it_is_taken_as_one(field, value, moved):
    written = default_config()
    part, _, name = field.partition(".")
    written[part][name] = value
    for config in (check_config(written), changed(f"--config.{field}={value}")):
        fields = flatten(config)
        assert fields[f"config.{moved or field}"] == value
        assert moved is None or fields.get(f"config.{field}", "") == ""
        assert "config.pp.test" not in fields
        assert check_config(config_from_json(config_to_json(config))) == config


def test_a_split_on_the_command_line_leaves_the_operations_of_the_file():
    config = default_config()
    config.pp.train = "resize(8)"
    config.splits.train = "train[:98%]"
    config = override(config, ["--config.pp.train", "train[:50%]", "--config.pp.test=test[:9]"])
    assert config.pp.to_dict() == {"train": "resize(8)", "eval": "", "crop": 224, "resize": 0}
    assert config.splits.to_dict() == {"train": "train[:50%]", "test": "test[:9]"}


def test_operations_for_testing_have_another_field_than_the_originals_split():
    with pytest.raises(
        UserError, match=r"unknown field config\.pp\.test: did you mean config\.spl"
    ):
        changed("--config.pp.test=resize(8)|flip")


@pytest.mark.parametrize(
    ("name", "train", "p"),
    [
        ("none", "inception_crop(32)|flip|value_range(-1, 1)", 0.0),
        ("light1", "inception_crop(32)|flip|randaug(2, 0)|value_range(-1, 1)", 0.0),
        ("strong2", "inception_crop(32)|flip|randaug(2, 20)|value_range(-1, 1)", 0.8),
    ],
)
def test_augment_gives_the_operations_and_mixup_of_augreg(name, train, p):
    config = changed(f"--config.augment={name}", "--config.pp.crop=32")
    assert train_spec(config) == train
    assert mixup(config) == p
    assert eval_spec(config) == "resize(32)|value_range(-1, 1)"
    assert mixup(changed(f"--config.augment={name}", "--config.mixup=0.7")) == 0.7


def test_two_ways_to_say_how_to_augment_are_one_too_many():
    with pytest.raises(
        UserError, match=r"config\.augment medium1 and config\.pp\.train 'flip' both"
    ):
        changed("--config.augment=medium1", "--config.pp.train=flip")
    with pytest.raises(
        UserError, match=r"config\.augment is 'mediun1', expected one of none, light1"
    ):
        changed("--config.augment=mediun1")
    with pytest.raises(UserError, match=r"config\.cutmix is -1"):
        changed("--config.cutmix=-1")


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ("", []),
        ("b1=0.8 momentum=0.8", ["config.b1 0.8 (config.optim is sgd)"]),
        ("b1=0.8 optim=adamw", []),
        ("momentum=0.8 optim=adamw", ["config.momentum 0.8 (config.optim is adamw)"]),
        ("pp.crop=8 pp.train=flip", []),
        (
            "pp.crop=8 pp.resize=9 pp.train=flip pp.eval=rgb",
            [
                "config.pp.resize 9 (config.pp.eval is set)",
                "config.pp.crop 8 (config.pp.train and config.pp.eval are set)",
            ],
        ),
    ],
)
def test_what_is_set_and_has_no_effect_is_told(options, found):
    config = changed(*(f"--config.{option}" for option in options.split()))
    assert without_effect(config) == found


def test_the_size_to_resize_to_and_operations_of_ones_own():
    config = changed("--config.pp.resize=40", "--config.pp.crop=32")
    assert eval_spec(config) == "resize_small(40)|central_crop(32)|value_range(-1, 1)"
    with pytest.raises(UserError, match=r"config\.pp\.resize 30 is less than config\.pp\.crop 32"):
        eval_spec(changed("--config.pp.resize=30", "--config.pp.crop=32"))
    own = changed("--config.pp.eval=resize(8)", "--config.pp.train=resize(8)|flip")
    assert (train_spec(own), eval_spec(own)) == ("resize(8)|flip", "resize(8)")
