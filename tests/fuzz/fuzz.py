"""Damages real files of every kind that is read, and reads them: success, or one clear line.

    python tests/fuzz/fuzz.py --minutes=60 --seed=0 --keep=/tmp/failures

Each case is read in a process of its own, forked from this one, with bounds of memory and time.
What is neither read nor refused by a `UserError` (a traceback, a crash, no answer in time, more
memory than the bound) is a failure, and its input is kept. At the end there is a table of what was
tried.
"""

import argparse
import collections
import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ |= {"JAX_PLATFORMS": "cpu", "VIT_JAX_OFFLINE": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import cv2
import numpy as np
from orbax.checkpoint import v1

from tests import families
from tests.checkpoints import test_fuzz as headers
from vit_jax import data, load
from vit_jax.checkpoints import augreg, load_weights
from vit_jax.checkpoints.convert import convert
from vit_jax.errors import UserError
from vit_jax.tokenizers import open_tokenizer
from vit_jax.training import default_config
from vit_jax.training.config import config_to_json
from vit_jax.training.outputs import evaluate_workdir
from vit_jax.training.workdir import read_metrics

# Imported here, that it needn't be in every process.
with contextlib.suppress(ImportError):
    import safetensors.numpy  # noqa: F401
    import scipy.ndimage  # noqa: F401
    import sentencepiece
    import tensorstore  # noqa: F401
    import tokenizers  # noqa: F401

# By JAX and Python: nothing is computed in this process, so that it has no threads.
warnings.filterwarnings("ignore", ".*fork")

MEMORY = 1 << 30  # Bytes more than this process has; the files have a megabyte at most.
SECONDS = 20
OK, REFUSED = "read", "refused"

NUMBERS = (0, 1, 127, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1)
DIGITS = [b"0", b"1", b"2", b"3", b"8", b"30", b"-1", b"0.5", b"1e3", b"13000", b"9" * 50]
TEXTS = [
    *("", "0", "-1", "1e999", "NaN", "Infinity", "-Infinity", "null", "true", "[]", "{}", "[[[["),
    *('"', "'", ",", ";", "\t", "\n", "\r\n", "|", "(", ")", "=", "..", "/", "~nobody", "\\", "é"),
    *("9" * 5000, "[" * 20_000, '{"a":' * 20_000, "13000", "resize(13000)", "random_crop(8)"),
    *("\x00", "\x1b[2J", "\ufeff", "\ud7ff", "/dev/zero", "/dev/stdin", "%s%n", "=cmd()"),
]


# Real files, made once.


def images(folder: Path) -> None:
    x = np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8)
    smooth = cv2.GaussianBlur(x, (0, 0), 4)
    kinds: dict[str, list[int] | None] = dict.fromkeys(("gray.png", "16.png"))
    kinds |= {f"a.{ending}": [] for ending in ("jpg", "png", "bmp", "webp", "tif", "ppm")}
    kinds["progressive.jpg"] = [cv2.IMWRITE_JPEG_PROGRESSIVE, 1]
    for name, options in kinds.items():
        image = smooth[..., 0] if options is None else smooth
        image = image.astype(np.uint16) * 257 if name == "16.png" else image
        cv2.imwrite(str(folder / name), image, options or [])


def read_image(path: Path) -> None:
    data.read(path, channels=3)


def tables(folder: Path) -> None:
    for i in range(6):
        cv2.imwrite(str(folder / f"{i}.png"), np.full((8, 8, 3), 40 * i, np.uint8))
    rows = [(f"{i}.png", ("cat", "dog")[i % 2], ("train", "test")[i // 4]) for i in range(6)]
    (folder / "a.csv").write_text("path,label,split\n" + "".join(f"{','.join(r)}\n" for r in rows))
    lines = [json.dumps({"path": p, "labels": [label], "split": s}) for p, label, s in rows]
    (folder / "b.jsonl").write_text("\n".join(lines) + "\n")


def read_table(path: Path) -> None:
    for source in data.open_splits(str(path)).values():
        opened = source()
        for i in range(len(opened)):
            opened[i]


def arrays(folder: Path) -> None:
    x = np.random.default_rng(0).integers(0, 256, (8, 6, 6, 3), np.uint8)
    np.savez(folder / "a.npz", images=x, labels=np.arange(8) % 3)
    np.savez_compressed(folder / "b.npz", train_images=x, train_labels=np.arange(8) % 2)


def weights(ending: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        for name in ("hybrid", "MAP", "Mixer", "sincos2d", "LiT of BERT"):
            families.make(name, folder).save(folder / f"{name.replace(' ', '_')}{ending}")

    return make


def folders(folder: Path) -> None:
    weights(".orbax")(folder)
    tree = families.make("MAP", folder).params
    v1.save(folder / "theirs.orbax", tree)
    context = v1.Context()
    context.array.saving.use_ocdbt = False
    with context:
        v1.save(folder / "files.orbax", tree)


def read_and_convert(path: Path) -> None:
    load_weights(path)
    convert(path, path.parent / "converted.npz", force=True)


def notes(folder: Path) -> None:
    weights(".npz")(folder)


def configs(folder: Path) -> None:
    metrics(folder)
    (folder / "config.json").write_text(config_to_json(default_config()))


def metrics(folder: Path) -> None:
    lines = [{"step": i, "train/loss": 2.5 / (i + 1), "train/lr": None} for i in range(9)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def words(folder: Path) -> None:
    (folder / "words.txt").write_text("\n".join(families.WORDS) + "\n")


def pieces(folder: Path) -> None:
    sentences = ["a photo of a cat", "a photo of the dog", "two cats and three dogs on a lawn"] * 30
    with (folder / "pieces.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=file,
            vocab_size=40,
            hard_vocab_limit=False,
            minloglevel=2,
        )


def tokenize(path: Path) -> None:
    open_tokenizer(path)(["a photo of a cat", "Zürich 👍 日本", ""])


def text_of(path: Path) -> str:
    """What a person types."""
    return path.read_text(errors="replace") if path.is_file() else ""


def indices(folder: Path) -> None:
    rows = ["name,ds,final_val,wd,filename", "Ti/16,i21k,0.4,0.1,Ti_16-i21k", "B/16,i1k,,0.03,B_16"]
    (folder / "index.csv").write_text("\n".join(rows) + "\n")
    (folder / "query.txt").write_text("name == 'B/16' and ds in ('i21k', 'i1k') and not wd <= 0.03")


def read_index(path: Path) -> None:
    if path.suffix == ".csv":
        rows = augreg.read_index(path)
        augreg.sort(augreg.query(rows, "wd <= 0.1 and 'i' in ds"), "final_val")
    else:
        row = {"name": "B/16", "ds": "i1k", "wd": 0.1, "final_val": None, "filename": "B_16"}
        augreg.query([row], text_of(path))


def specs(folder: Path) -> None:
    texts = [
        "decode|resize_small(256)|central_crop(224)|value_range(-1, 1)",
        "inception_crop((24, 32))|flip|randaug(2, 9)|normalize((0.5, 0.4, 0.3), 0.2)",
    ]
    for i, text in enumerate(texts):
        (folder / f"{i}.txt").write_text(text)


def apply_spec(path: Path) -> None:
    preprocess = data.parse(text_of(path), max_pixels=1024)
    preprocess(np.zeros((20, 30, 3), np.uint8), np.random.default_rng(0))


# Kind: who makes the files, which of them are damaged, and who reads one of them.
KINDS: dict[str, tuple[Callable, str, Callable]] = {
    "images": (images, "*.*", read_image),
    "tables": (tables, "*.[cj]s*", read_table),
    "data in .npz": (arrays, "*.npz", read_table),
    "weights in .npz": (weights(".npz"), "*.npz", read_and_convert),
    "weights in .safetensors": (weights(".safetensors"), "*.safetensors", read_and_convert),
    "weights in Orbax folders": (folders, "*.orbax", read_and_convert),
    "notes beside weights": (notes, "*.json", lambda path: load(path.with_suffix(".npz"))),
    "config.json": (configs, "config.json", lambda path: evaluate_workdir(path.parent)),
    "metrics.jsonl": (metrics, "metrics.jsonl", read_metrics),
    "words": (words, "words.txt", tokenize),
    "pieces": (pieces, "pieces.model", tokenize),
    "index and queries": (indices, "*.*", read_index),
    "preprocessing": (specs, "*.txt", apply_spec),
}
# Files of weights whose headers lie are made from nothing.
LIARS = {
    "names and shapes": headers.bad_names_and_shapes,
    "bytes of headers": headers.bad_bytes,
    "lengths": headers.bad_lengths,
    "JSON of headers": headers.bad_json,
}


# Damage.


def damage(content: bytes, other: bytes, chance: random.Random) -> bytes:
    """One to eight changes of a file; `other` is one of the same kind."""
    found = bytearray(content)
    is_text = content[:200].isascii() and b"\0" not in content
    for _ in range(chance.choice([1, 1, 1, 2, 3, 8])):
        size = len(found)
        a, b = sorted(chance.randrange(size + 1) for _ in range(2))
        if chance.random() < 0.5:  # Headers are at the ends, and numbers are short.
            a = min(chance.choice([a % 300, size - a % 300]) % (size + 1), size)
            b = min(a + chance.choice([1, 2, 4, 8, 64]), size)
        light = ["bit", "byte", "number"] * 3
        light = ["digits", "digits", "text", "byte"] if is_text else light
        match chance.choice([*light, "cut", "drop", "twice", "splice", "text"]):
            case "digits":
                if places := list(re.finditer(rb"[-0-9.]+", found)):
                    place = chance.choice(places)
                    found[slice(*place.span())] = chance.choice(DIGITS)
            case "bit" if size:
                found[a % size] ^= 1 << chance.randrange(8)
            case "byte" if size:
                found[a % size] = chance.choice([0, 255, chance.randrange(256)])
            case "number":
                kind = chance.choice(["<H", ">H", "<I", ">I", "<Q", ">Q"])
                number = chance.choice(NUMBERS) % (1 << 8 * struct.calcsize(kind))
                found[a : a + struct.calcsize(kind)] = struct.pack(kind, number)
            case "cut":
                del found[a:]
            case "drop":
                del found[a:b]
            case "twice":
                found[a:a] = found[a:b] * chance.choice([1, 1, 3, 100 if b - a < 1000 else 1])
            case "splice":
                found[a:] = other[chance.randrange(len(other) + 1) :]
            case "text":
                found[a:b] = chance.choice(TEXTS).encode("utf-8", "surrogatepass")
    return bytes(found[: 1 << 20])


def case(kind: str, originals: Path, folder: Path, chance: random.Random) -> Path:
    """Copies the files of a kind into a folder and damages one, which is what is read."""
    if kind in LIARS:
        LIARS[kind](folder / "weights", chance)
        return folder / "weights"
    shutil.copytree(originals, folder, dirs_exist_ok=True)
    chosen = sorted(folder.glob(KINDS[kind][1]))
    path = victim = chance.choice(chosen)
    others = chosen
    if path.is_dir():
        others = sorted(f for f in path.rglob("*") if f.is_file())
        victim = chance.choice(others)
    other = chance.choice(others).read_bytes()
    if chance.random() < 0.01:  # Now and then what is no regular file, or not there.
        victim.unlink()
        chance.choice([lambda: None, victim.mkdir, lambda: victim.symlink_to("/dev/zero")])()
    else:
        victim.write_bytes(damage(victim.read_bytes(), other, chance))
    return path


# One case in a process of its own.


def attempt(read: Callable[[Path], None], path: Path) -> tuple[str, float, int]:
    """What became of it ("read", "refused", or the failure), its seconds and bytes of memory."""
    answers, answer = os.pipe()
    start = time.monotonic()
    child = os.fork()
    if not child:
        os.close(answers)
        _run_and_exit(read, path, answer)
    os.close(answer)
    said = b""
    with os.fdopen(answers, "rb") as pipe, contextlib.suppress(TimeoutError):
        said = _read_until(pipe, start + SECONDS)
    if time.monotonic() > start + SECONDS:
        os.kill(child, signal.SIGKILL)
    _, status, usage = os.wait4(child, 0)
    seconds, memory = time.monotonic() - start, usage.ru_maxrss * 1024
    if seconds > SECONDS:
        return f"no answer in {SECONDS} s", seconds, memory
    if os.WIFSIGNALED(status):
        return f"ended by {signal.Signals(os.WTERMSIG(status)).name}", seconds, memory
    return said.decode(errors="replace") or f"exit status {status >> 8}", seconds, memory


def _read_until(pipe, deadline: float) -> bytes:
    import select

    said = b""
    while select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
        piece = os.read(pipe.fileno(), 1 << 16)
        if not piece:
            return said
        said += piece
    raise TimeoutError


def _run_and_exit(read: Callable[[Path], None], path: Path, answer: int) -> None:
    said = "no answer"
    try:
        for number in (0, 1, 2):  # A reader of standard input would wait for ever.
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        # Threads reserve addresses that they never use: the rest is measured.
        bound = (used + 6 * MEMORY, resource.RLIM_INFINITY)
        resource.setrlimit(resource.RLIMIT_AS, bound)
        resource.setrlimit(resource.RLIMIT_CPU, (2 * SECONDS, 2 * SECONDS + 1))
        try:
            read(path)
            said = OK
        except UserError as error:
            text = str(error)
            said = (
                REFUSED if text.isprintable() and len(text) < 20_000 else f"message: {text[:500]}"
            )
    except BaseException:
        said = f"traceback\n{traceback.format_exc(limit=-8)}"
    finally:
        os.write(answer, said.encode(errors="replace")[:60_000])
        os._exit(0)


# All.


def cases(originals: Path, seed: int) -> Iterator[tuple[str, random.Random]]:
    kinds = [*KINDS, *LIARS]
    number = 0
    while True:
        for kind in kinds:
            yield kind, random.Random(f"{seed} {number} {kind}")
        number += 1


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 1 if there were failures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="the kinds whose names contain this")
    parser.add_argument("--keep", default=str(Path(tempfile.gettempdir(), "fuzz-failures")))
    args = parser.parse_args(argv)
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    worst: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as place:
        originals, folder = Path(place, "originals"), Path(place, "case")
        _in_a_process(lambda: _make_originals(originals))
        # What the process itself has, forked, is no case's doing.
        _, _, baseline = attempt(lambda path: None, folder)
        deadline = time.monotonic() + 60 * args.minutes
        for kind, chance in cases(originals, args.seed):
            if time.monotonic() > deadline:
                break
            if args.only and args.only not in kind:
                continue
            folder.mkdir()
            path = case(kind, originals / kind, folder, chance)
            reader = load_weights if kind in LIARS else KINDS[kind][2]
            outcome, seconds, memory = attempt(reader, path)
            grown = max(0, memory - baseline)
            if grown > MEMORY and outcome in (OK, REFUSED):
                outcome = f"{grown / 2**20:,.0f} MiB of memory"
            counts[kind][outcome if outcome in (OK, REFUSED) else "failed"] += 1
            worst[kind] = [max(worst[kind][0], seconds), max(worst[kind][1], grown)]
            if outcome not in (OK, REFUSED):
                kept = Path(args.keep, f"{args.seed}-{len(failures)}")
                shutil.rmtree(kept, ignore_errors=True)
                shutil.copytree(folder, kept, symlinks=True)
                (kept / "outcome").write_text(f"{kind}: {path.name}\n{outcome}\n")
                failures.append(f"{kind}, {kept}/{path.name}: {outcome.splitlines()[-1][:200]}")
                print("FAILED", failures[-1], flush=True)
            shutil.rmtree(folder)
    print(f"{'kind':<26} {'cases':>6} {OK:>6} {REFUSED:>8} {'failed':>6} {'worst s':>8} {'MiB':>6}")
    for kind, found in counts.items():
        seconds, memory = worst[kind]
        numbers = f"{found[OK]:>6} {found[REFUSED]:>8} {found['failed']:>6}"
        print(f"{kind:<26} {found.total():>6} {numbers} {seconds:>8.2f} {memory / 2**20:>6.0f}")
    total = sum(found.total() for found in counts.values())
    print(f"{total:,} cases, {len(failures)} failures")
    return int(bool(failures))


def _make_originals(place: Path) -> None:
    for kind, (make, _, _) in KINDS.items():
        (place / kind).mkdir(parents=True)
        make(place / kind)


def _in_a_process(work: Callable[[], None]) -> None:
    """JAX and TensorStore start threads, and a process with threads can't be forked safely."""
    child = os.fork()
    if not child:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    if os.waitpid(child, 0)[1]:
        raise SystemExit("the files to damage can't be made")


if __name__ == "__main__":
    sys.exit(main())
