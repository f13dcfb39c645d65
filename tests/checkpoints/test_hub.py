import http.server
import json
import os
import re
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import vit_jax
from tests.checkpoints.test_torch import written
from vit_jax.checkpoints import hub, save_weights
from vit_jax.checkpoints.hub import STORE, cache_path, resolve, sidecar_files, url_for
from vit_jax.errors import UserError

TI = "Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0"
INDEX = f"""name,ds,final_val,filename
Ti/16,i21k,0.3,Ti_16-i21k-300ep-lr_0.001-aug_strong1-wd_0.1-do_0.0-sd_0.0
Ti/16,i21k,0.4,{TI}
Ti/16,i1k,0.9,Ti_16-i1k-300ep-lr_0.001-aug_none-wd_0.1-do_0.0-sd_0.0
R+Ti/16,i21k,0.8,R_Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0
"""
EMPTY_NPZ = b"PK\x05\x06" + bytes(18)  # The shortest complete archive.


ADAPTED = f"""name,ds,final_val,filename,adapt_ds,adapt_final_val,adapt_filename
Ti/16,i21k,0.4,{TI},cifar100,0.7,{TI}--cifar100-steps_10k-lr_0.03-res_224
Ti/16,i21k,0.4,{TI},cifar100,0.8,{TI}--cifar100-steps_10k-lr_0.01-res_224
Ti/16,i21k,0.4,{TI},imagenet2012,0.9,{TI}--imagenet2012-steps_20k-lr_0.03-res_384
"""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    for name in ("VIT_JAX_OFFLINE", "VIT_JAX_MIRROR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("VIT_JAX_CACHE", str(tmp_path / "files"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "files"


@pytest.fixture
def mirror(monkeypatch):
    """A server that has {path: content}, set as the mirror; its `asked` lists the paths."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            server.asked.append(self.path)
            content = server.content.get(self.path)
            self.send_response(200 if content is not None else 404)
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.content, server.asked = {}, []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    monkeypatch.setenv("VIT_JAX_MIRROR", f"http://127.0.0.1:{server.server_address[1]}/")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("imagenet21k/ViT-B_16", "vit_models/imagenet21k/ViT-B_16.npz"),
        ("imagenet21k/ViT-B_16.npz", "vit_models/imagenet21k/ViT-B_16.npz"),
        ("ViT-B_16", "vit_models/imagenet21k/ViT-B_16.npz"),
        ("R50+ViT-B_16", "vit_models/imagenet21k/R50+ViT-B_16.npz"),
        ("imagenet21k+imagenet2012/ViT-L_32", "vit_models/imagenet21k+imagenet2012/ViT-L_32.npz"),
        ("sam/ViT-B_32", "vit_models/sam/ViT-B_32.npz"),
        ("gsam/ViT-B_16-gap-norep", "vit_models/gsam/ViT-B_16-gap-norep.npz"),
        ("mixer/Mixer-B_16", "mixer_models/imagenet21k/Mixer-B_16.npz"),
        ("Mixer-L_16", "mixer_models/imagenet21k/Mixer-L_16.npz"),
        ("mixer/imagenet1k/Mixer-B_16", "mixer_models/imagenet1k/Mixer-B_16.npz"),
        ("lit/LiT-B16B", "vit_models/lit/LiT-B16B.npz"),
        ("LiT-L16Ti", "vit_models/lit/LiT-L16Ti.npz"),
        (f"augreg/{TI}", f"vit_models/augreg/{TI}.npz"),
        (f"augreg/{TI}.npz", f"vit_models/augreg/{TI}.npz"),
        (
            f"{TI}--imagenet2012-steps_20k-lr_0.03-res_384",
            f"vit_models/augreg/{TI}--imagenet2012-steps_20k-lr_0.03-res_384.npz",
        ),
        ("big_vision/vit_s16_i1k_90ep", "big_vision/vit_s16_i1k_90ep.npz"),
        ("deit3/bv_deit_3_base_384_21k", "big_vision/zoo/deit3/bv_deit_3_base_384_21k.npz"),
        ("siglip2/siglip2_g-opt16_384", "big_vision/siglip2/siglip2_g-opt16_384.npz"),
        ("flexivit/flexivit_s_i1k", "big_vision/flexivit/flexivit_s_i1k.npz"),
        ("gs://big_vision/vit_s16_i1k_90ep.npz", "big_vision/vit_s16_i1k_90ep.npz"),
        ("gs://bucket/a b/ü?.npz", "bucket/a%20b/%C3%BC%3F.npz"),
    ],
)
def test_names_have_an_address(name, place):
    assert url_for(name) == f"{STORE}/{place}"


def test_addresses_stay_as_they_are_but_for_odd_characters():
    assert url_for("https://host:8/a/b.npz?x=1&y=%20") == "https://host:8/a/b.npz?x=1&y=%20"
    assert url_for("https://host/a b.npz") == "https://host/a%20b.npz"


def test_a_model_and_a_data_set_mean_the_best_that_was_fine_tuned_to_it(mirror):
    mirror.content["/vit_models/augreg/index.csv"] = ADAPTED.encode()
    place = f"{STORE}/vit_models/augreg/{TI}--"
    assert url_for("augreg/Ti_16+cifar100") == f"{place}cifar100-steps_10k-lr_0.01-res_224.npz"
    assert url_for("augreg/Ti_16+imagenet2012").startswith(f"{place}imagenet2012-")
    with pytest.raises(
        UserError, match="no Ti_16 fine-tuned to 'pets', only to cifar100, imagenet"
    ):
        url_for("augreg/Ti_16+pets")
    with pytest.raises(UserError, match="no B_16 fine-tuned to 'pets', only to nothing"):
        url_for("augreg/B_16+pets")


@pytest.mark.parametrize("name", ["augreg/Ti_16", "Ti_16", "ViT-Ti_16"])
def test_a_model_means_the_recommended_augreg_checkpoint(mirror, name):
    mirror.content["/vit_models/augreg/index.csv"] = INDEX.encode()
    assert url_for(name) == f"{STORE}/vit_models/augreg/{TI}.npz"
    assert "/augreg/R_Ti_16-i21k-" in url_for("R+ViT-Ti_16")
    assert mirror.asked == ["/vit_models/augreg/index.csv"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Vit-B_16", "did you mean imagenet21k/ViT-B_16"),
        ("augreg/B_17", "did you mean augreg/B_16"),
        ("imagenet21/ViT-B_16", "did you mean imagenet21k/ViT-B_16"),
        ("ViT-S_16-gap-norep", "did you mean gsam/ViT-S_16-gap-norep"),
        ("LiT-B16", "did you mean lit/LiT-B16B"),
        ("runs/flowers", "no such file.*vit-jax models"),
        ("missing.npz", "no such file: missing.npz"),
        ("", "no such file"),
        ("imagenet21k/../../etc/passwd", "no such file"),
        ("imagenet21k/", "no such file"),
        ("augreg/", "no such file"),
        ("gs://bucket", "names no file"),
        ("gs://bucket/folder/", "names no file"),
        ("ftp://host/x.npz", "no such file"),
    ],
)
def test_unknown_names_are_answered_with_the_nearest(name, message):
    with pytest.raises(UserError, match=message) as caught:
        url_for(name)
    assert "\n" not in str(caught.value)


def test_known_names_all_have_an_address(mirror):
    mirror.content["/vit_models/augreg/index.csv"] = (
        "name,ds,final_val,filename\n"
        + "".join(f"x,i21k,0.1,{model}-i21k-300ep-x\n" for model in hub.augreg.MODELS)
    ).encode()
    addresses = {name: url_for(name) for name in hub.names()}
    releases = "https://github.com/yitu-opensource/T2T-ViT/releases/download/main/"
    for name, url in addresses.items():
        if name.startswith("t2t/"):
            assert url.startswith(releases)
            assert url.endswith(".pth" if "cifar" in name else ".pth.tar")
        elif name.startswith("swin"):
            place = (
                f"SwinTransformer/storage/releases/download/v{1 + name.startswith('swinv2')}.0.0"
            )
            assert re.fullmatch(rf"https://github\.com/{place}/swin\w+\.pth", url)
        else:
            assert url.endswith(".npz")
    assert addresses["t2t/T2T-ViT-t-14"] == f"{releases}81.7_T2T_ViTt_14.pth.tar"
    assert addresses["t2t/cifar100/T2T-ViT-14"] == f"{releases}cirfar100_t2t-vit-14_88.4.pth"
    # By the names of the files, too, of which there may be more.
    assert url_for("t2t/81.7_T2T_ViTt_14") == addresses["t2t/T2T-ViT-t-14"]
    assert url_for("t2t/84.2_T2T_ViT_24.pth.tar") == f"{releases}84.2_T2T_ViT_24.pth.tar"


def test_a_local_path_wins_over_a_name(tmp_path):
    (tmp_path / "Ti_16").mkdir()
    (tmp_path / "x.npz").write_bytes(b"")
    assert resolve("Ti_16") == Path("Ti_16")
    assert resolve(tmp_path / "x.npz") == tmp_path / "x.npz"
    with pytest.raises(UserError, match="no such file"):
        resolve(Path("ViT-B_16"))


def test_a_name_is_downloaded_once(mirror, cache):
    mirror.content["/vit_models/augreg/index.csv"] = INDEX.encode()
    mirror.content[f"/vit_models/augreg/{TI}.npz"] = EMPTY_NPZ
    path = resolve("augreg/Ti_16")
    assert path.read_bytes() == EMPTY_NPZ
    assert path == cache / "storage.googleapis.com" / "vit_models" / "augreg" / f"{TI}.npz"
    assert resolve("augreg/Ti_16") == resolve(f"gs://vit_models/augreg/{TI}.npz") == path
    assert len(mirror.asked) == 2


def test_lit_bundles_come_with_their_vocabulary(mirror):
    mirror.content["/vit_models/lit/LiT-B16B.npz"] = EMPTY_NPZ
    mirror.content["/vit_models/lit/LiT-B16B.txt"] = b"[PAD]\n"
    mirror.content["/vit_models/lit/LiT-L16S.npz"] = EMPTY_NPZ
    mirror.content["/vit_models/lit/LiT-L16S.model"] = b"spm"
    assert resolve("lit/LiT-B16B").with_suffix(".txt").read_bytes() == b"[PAD]\n"
    assert resolve("gs://vit_models/lit/LiT-L16S.npz").with_suffix(".model").read_bytes() == b"spm"
    assert sidecar_files(url_for("ViT-B_16")) == ()


def test_load_takes_names(mirror, tmp_path):
    model = vit_jax.create_model("ViT-Ti_16", num_classes=5, num_layers=1)
    params = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    save_weights(tmp_path / "weights.npz", params)
    mirror.content["/vit_models/sam/ViT-B_16.npz"] = (tmp_path / "weights.npz").read_bytes()
    assert vit_jax.load("sam/ViT-B_16").spec.num_classes == 5


def test_a_file_the_server_has_not_is_said_with_its_address(mirror):
    with pytest.raises(UserError, match=r"404.*by hand") as caught:
        resolve("sam/ViT-X_16")
    assert "/vit_models/sam/ViT-X_16.npz" in str(caught.value)


@pytest.fixture
def theirs(mirror, tmp_path):
    """A file of transformers' and what lies beside it, on the server: its address."""
    file = written("hf-vit", tmp_path)
    values = {"image_mean": [0.1] * 3, "image_std": [0.2] * 3, "size": 12, "resample": 3}
    mirror.content |= {
        "/files/model.safetensors": file.read_bytes(),
        "/files/config.json": (tmp_path / "config.json").read_bytes(),
        "/files/preprocessor_config.json": json.dumps(values).encode(),
    }
    return f"{os.environ['VIT_JAX_MIRROR']}files/model.safetensors"


def test_what_describes_weights_of_pytorch_is_fetched_with_them(mirror, theirs):
    vit = vit_jax.load(theirs)
    assert vit.spec.num_heads == 3
    assert vit.preprocess == "resize(12, method='pil_bicubic')|normalize(0.1, 0.2)"
    assert len(mirror.asked) == 3
    vit_jax.load(theirs)
    assert len(mirror.asked) == 3


def test_weights_may_have_nothing_beside_them(mirror, theirs):
    del mirror.content["/files/config.json"], mirror.content["/files/preprocessor_config.json"]
    with pytest.raises(UserError, match="give their number"):
        vit_jax.load(theirs)
    assert vit_jax.load(theirs, heads=3).spec.layer_norm_epsilon == 1e-12
    assert len(mirror.asked) == 3


@pytest.mark.parametrize("page", [b"<html>no such page</html>", b"[]", b"\xff", b"[" * 100_000])
def test_a_page_that_stands_for_an_absent_file_is_left_out_and_that_is_said(
    mirror, theirs, caplog, page
):
    mirror.content["/files/config.json"] = mirror.content["/files/preprocessor_config.json"] = page
    for _ in range(2):
        assert vit_jax.load(theirs, heads=3).spec.layer_norm_epsilon == 1e-12
    assert caplog.text.count("gives no JSON object and is left out") == 2
    assert "files/config.json gives no" in caplog.text
    assert not [*cache_path(theirs).parent.glob("*.json")]


def test_what_describes_them_has_a_largest_size(mirror, theirs, monkeypatch):
    monkeypatch.setattr(hub, "_TEXT", 10_000)
    mirror.content["/files/config.json"] = b"{" + b" " * 20_000 + b"}"
    with pytest.raises(UserError, match=r"config\.json gives more than 0 MB, too much"):
        vit_jax.load(theirs)


def test_offline_only_the_cache_is_used(mirror, cache, monkeypatch):
    kept = cache_path(f"{STORE}/vit_models/imagenet21k/ViT-B_32.npz")
    kept.parent.mkdir(parents=True)
    kept.write_bytes(EMPTY_NPZ)
    monkeypatch.setenv("VIT_JAX_OFFLINE", "1")
    assert resolve("ViT-B_32") == kept
    with pytest.raises(UserError, match="switched off") as caught:
        resolve("ViT-B_16")
    assert "/vit_models/imagenet21k/ViT-B_16.npz by hand" in str(caught.value)
    assert str(kept.with_name("ViT-B_16.npz")) in str(caught.value)
    assert mirror.asked == []
    mirror.content["/vit_models/imagenet21k/ViT-B_16.npz"] = EMPTY_NPZ
    assert resolve("ViT-B_16", offline=False).is_file()


def test_without_a_network_the_weights_own_address_is_named_first(monkeypatch):
    monkeypatch.setenv("VIT_JAX_OFFLINE", "1")
    for name in ("augreg/Ti_16", "Ti_16"):
        with pytest.raises(UserError) as caught:
            resolve(name)
        first, second = re.findall(r"https://[^ ]+", str(caught.value))
        assert first == f"{STORE}/vit_models/augreg/{TI}.npz"
        assert second == f"{STORE}/vit_models/augreg/index.csv"
    with pytest.raises(UserError) as caught:
        resolve("lit/LiT-B16B")
    addresses = re.findall(r"https://[^ ]+", str(caught.value))
    assert addresses == [f"{STORE}/vit_models/lit/LiT-B16B.{ending}" for ending in ("npz", "txt")]
    with pytest.raises(UserError, match=r"index\.csv is not in the cache"):
        resolve("augreg/B_8")  # What is recommended of it, the table alone says.


@pytest.mark.parametrize("value", ["", "0", "false"])
def test_the_offline_switch_can_be_off(mirror, monkeypatch, value):
    monkeypatch.setenv("VIT_JAX_OFFLINE", value)
    mirror.content["/vit_models/sam/ViT-B_16.npz"] = EMPTY_NPZ
    assert resolve("sam/ViT-B_16").is_file()


def test_a_mirror_is_an_http_address(monkeypatch):
    monkeypatch.setenv("VIT_JAX_MIRROR", "file:///data")
    with pytest.raises(UserError, match="VIT_JAX_MIRROR is 'file:///data'"):
        resolve("ViT-B_16")


@pytest.mark.parametrize(
    "url",
    [
        "https://host/..%2f..%2fetc/passwd",
        "https://host/a%00b/c.npz",
        "https://host/" + "x" * 300 + ".npz",
        "https://host/a\\b:c*?.npz",
        "http://127.0.0.1:80/x.npz",
        "https://host/CON|<>.npz?a/../b",
    ],
)
def test_no_address_leaves_the_cache_or_makes_odd_names(url, cache):
    path = cache_path(url)
    assert cache in path.parents
    assert os.path.normpath(path) == str(path)
    for part in path.relative_to(cache).parts:
        assert len(part) <= 200
        assert not set(part) & set('\\:*?"<>|\0')
    assert path.suffix in (".npz", "")


@pytest.mark.parametrize(
    "url", ["https://host/../x", "https://[bad/x.npz", "https://host/%2e%2e/x", "https://host/"]
)
def test_addresses_that_name_no_file_are_refused(url):
    with pytest.raises(UserError, match="names no file"):
        cache_path(url)


def test_addresses_that_differ_are_kept_apart():
    urls = [
        "https://host/x.npz",
        "http://host/x.npz",
        "https://host:8/x.npz",
        "https://host/x.npz?version=1",
        "https://host/x.npz?version=2",
        "https://host/" + "x" * 300 + ".npz",
        "https://host/" + "x" * 301 + ".npz",
    ]
    assert len({cache_path(url) for url in urls}) == len(urls)


def test_sources_of_a_model_are_loadable_names():
    assert hub.sources("ViT-B_16") == [
        "augreg/B_16",
        "imagenet21k/ViT-B_16",
        "imagenet21k+imagenet2012/ViT-B_16",
        "imagenet21k+imagenet2012/ViT-B_16-224",
        "sam/ViT-B_16",
    ]
    assert hub.sources("Mixer-B_16")[0] == "mixer/Mixer-B_16"
    assert hub.sources("T2T-ViT-14")[:2] == ["t2t/T2T-ViT-14", "t2t/T2T-ViT-14-384"]
    assert hub.sources("ViT-e_14") == []
