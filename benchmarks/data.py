"""How many images a second are read, decoded, randomly cropped to 224x224 and mirrored.

    pip install -e . tensorflow-cpu timm torchvision
    python benchmarks/data.py [FOLDER]

FOLDER holds JPEGs in class folders; without it, 1,024 images of 500x375 are made. Every loader
gets the same files, gives batches of 128 for the same time, and runs in a process of its own, in
turns, so that whatever else the machine does slows all alike. The figure is the median of the
rounds; the first batches of each run don't count. A loader that isn't installed is left out and
named.

The first table is of 1, 2, 4, ... processes up to the cores there are, the second of every loader
with all cores. There, "decode and resize alone" is what all cores manage with no loader around it;
once more without what the system takes for giving each image fresh memory.
"""

import argparse
import contextlib
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

CORES = len(os.sched_getaffinity(0))
BATCH = 128


def ours(folder: Path, as_uint8: bool = True, **options) -> Iterator[int]:
    """`data.train_batches`, as training uses it: rounded to uint8, normalised on the device."""
    from vit_jax import data

    source = data.open_source(str(folder), "train+test")
    preprocess = data.parse("inception_crop(224)|flip|value_range(-1, 1)")
    if as_uint8:
        preprocess = preprocess.without_normalize(as_uint8=True)
    for batch in data.train_batches(source, preprocess, batch_size=BATCH, seed=0, **options):
        yield len(batch["image"])


def ours_threads(folder: Path, count: int) -> Iterator[int]:
    """By so many threads."""
    return ours(folder, threads=count)


def ours_processes(folder: Path, count: int) -> Iterator[int]:
    """By so many worker processes."""
    return ours(folder, workers=count)


def ours_float32(folder: Path, count: int) -> Iterator[int]:
    """The original's unrounded images, normalised by whoever reads, chosen as by default."""
    from vit_jax import data

    source = data.open_source(str(folder), "train+test")
    chosen = data.choose_readers(source, cores=count)
    return ours(folder, as_uint8=False, workers=chosen.workers, threads=chosen.threads)


def tf_data(folder: Path, count: int) -> Iterator[int]:
    """A tf.data pipeline with the same operations, decoding only what the crop needs."""
    import tensorflow as tf

    def load(path):
        data = tf.io.read_file(path)
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            tf.image.extract_jpeg_shape(data),
            tf.zeros([0, 0, 4], tf.float32),
            area_range=(0.05, 1.0),
            min_object_covered=0,
            use_image_if_no_bounding_boxes=True,
        )
        window = tf.concat([begin[:2], size[:2]], axis=0)
        image = tf.image.decode_and_crop_jpeg(data, window, channels=3)
        image = tf.image.random_flip_left_right(tf.image.resize(image, (224, 224)))
        return (image - 127.5) / 127.5

    files = sorted(map(str, folder.glob("*/*.jpg")))
    dataset = tf.data.Dataset.from_tensor_slices(files).repeat().shuffle(len(files))
    dataset = dataset.map(load, num_parallel_calls=count)
    for batch in dataset.batch(BATCH).prefetch(tf.data.AUTOTUNE):
        yield len(batch.numpy())


def torchvision_loader(folder: Path, count: int) -> Iterator[int]:
    """torch's DataLoader with torchvision's decoder and transforms."""
    import torch
    from torchvision.datasets import ImageFolder
    from torchvision.io import ImageReadMode, decode_image, read_file
    from torchvision.transforms import v2

    torch.set_num_threads(1)
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(224, scale=(0.05, 1.0), antialias=False),
            v2.RandomHorizontalFlip(),
        ]
    )
    dataset = ImageFolder(
        folder,
        transform,
        loader=lambda path: decode_image(read_file(path), ImageReadMode.RGB),
    )
    return _torch_batches(dataset, count)


def timm_loader(folder: Path, count: int) -> Iterator[int]:
    """timm's dataset, transforms and collation (Pillow, uint8)."""
    import torch
    from timm.data import create_dataset, create_transform
    from timm.data.loader import fast_collate

    torch.set_num_threads(1)
    dataset = create_dataset("", str(folder), is_training=True)
    dataset.transform = create_transform(
        224,
        is_training=True,
        use_prefetcher=True,  # uint8, normalised later
        scale=(0.05, 1.0),
        color_jitter=None,
        interpolation="bilinear",
    )
    return _torch_batches(dataset, count, fast_collate)


def _torch_batches(dataset, count: int, collate=None) -> Iterator[int]:
    from torch.utils.data import DataLoader, RandomSampler

    sampler = RandomSampler(dataset, replacement=True, num_samples=10**7)
    loader = DataLoader(
        dataset,
        BATCH,
        sampler=sampler,
        num_workers=count,
        collate_fn=collate,
        drop_last=True,
    )
    for images, _ in loader:
        yield len(images)


def decode_and_resize_alone(folder: Path, count: int) -> Iterator[int]:
    """OpenCV in so many threads, on files that are in memory, the results thrown away."""
    import threading

    import cv2

    cv2.setNumThreads(0)
    files = [np.frombuffer(f.read_bytes(), np.uint8) for f in sorted(folder.glob("*/*.jpg"))]
    counts = [0] * count

    def work(thread: int) -> None:
        for file in itertools.cycle(files):
            cv2.resize(cv2.imdecode(file, cv2.IMREAD_COLOR_RGB), (224, 224))
            counts[thread] += 1

    for thread in range(count):
        threading.Thread(target=work, args=(thread,), daemon=True).start()
    before = 0
    while True:
        time.sleep(0.1)
        now = sum(counts)
        yield now - before
        before = now


def decode_and_resize_in_kept_memory(folder: Path, count: int) -> Iterator[int]:
    """The same where glibc keeps what was freed."""
    import ctypes

    libc = ctypes.CDLL(None)
    libc.mallopt(-4, 0)  # M_MMAP_MAX
    libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    return decode_and_resize_alone(folder, count)


LOADERS: dict[str, Callable[[Path, int], Iterator[int]]] = {
    "ours, processes": ours_processes,
    "ours, threads": ours_threads,
    "torchvision": torchvision_loader,
    "ours, float32": ours_float32,
    "tf.data": tf_data,
    "timm": timm_loader,
    "decode and resize alone": decode_and_resize_alone,
    "decode and resize alone, memory kept": decode_and_resize_in_kept_memory,
}
SCALED = tuple(LOADERS)[:3]


def measure(name: str, folder: Path, count: int, seconds: float) -> float:
    """Images a second of a loader that has warmed up: whose workers have all given a batch."""
    batches = LOADERS[name](folder, count)
    for _ in range(4 + count):
        next(batches)
    images, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < seconds:
        images += next(batches)
    return images / passed


def make_images(folder: Path, count: int = 1024) -> None:
    """Images with the detail of photos, smooth with some noise: 50 to 60 KB each as JPEG."""
    import cv2

    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = rng.uniform(0, 255, (12, 16, 3)).astype(np.float32)
        fine = rng.normal(0, 9, (375, 500, 3))
        image = cv2.resize(coarse, (500, 375), interpolation=cv2.INTER_CUBIC) + fine
        file = folder / "ab"[i % 2] / f"{i:04}.jpg"
        file.parent.mkdir(exist_ok=True)
        levels = image.clip(0, 255).astype(np.uint8)
        cv2.imwrite(str(file), levels, [cv2.IMWRITE_JPEG_QUALITY, 85])


def physical_cores() -> int:
    """The cores that this process was given, two threads of one counted once."""
    found = set()
    for core in os.sched_getaffinity(0):
        with contextlib.suppress(OSError):
            place = f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list"
            found.add(Path(place).read_text())
    return len(found) or CORES


def processor() -> str:
    """Its name, as the system has it."""
    with contextlib.suppress(OSError):
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        if found:
            return found[1]
    return platform.machine()


def main(folder: Path, options: argparse.Namespace) -> None:
    """Prints two tables."""
    runs = [(name, count) for count in options.processes for name in SCALED]
    runs += [(name, CORES) for name in options.loaders if (name, CORES) not in runs]
    runs = [run for run in runs if run[0] in options.loaders]
    rates: dict[tuple[str, int], list[float]] = {run: [] for run in runs}
    for _ in range(options.rounds):
        for name, count in runs:
            command = [sys.executable, __file__, str(folder), f"--loader={name}"]
            command += [f"--processes={count}", f"--seconds={options.seconds}"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:
                rates[name, count].append(json.loads(done.stdout.splitlines()[-1]))
            elif not rates[name, count]:
                error = done.stderr.strip().splitlines()[-1]
                print(f"{name}, {count}: {error}", file=sys.stderr)
    medians = {run: statistics.median(values) for run, values in rates.items() if values}
    files = list(folder.glob("*/*.jpg"))
    size = statistics.mean(f.stat().st_size for f in files)
    print(f"{len(files):,} JPEGs of {size / 1e3:.0f} KB; {processor()}, {CORES} cores, ", end="")
    print(f"{physical_cores()} of them physical\n")

    scaled = [name for name in SCALED if name in options.loaders]
    print("| processes or threads | " + " | ".join(f"{n} | of linear" for n in scaled) + " |")
    print("| --- " * (1 + 2 * len(scaled)) + "|")
    for count in options.processes:
        cells = []
        for name in scaled:
            rate, one = medians.get((name, count)), medians.get((name, options.processes[0]))
            share = rate and one and rate / one / count * options.processes[0]
            cells += [f"{rate:,.0f}" if rate else "-", f"{share:.2f}" if share else "-"]
        print(f"| {count} | " + " | ".join(cells) + " |")

    print("\n| loader, all cores | images a second |")
    print("| --- | --- |")
    for (name, count), rate in medians.items():
        if count == CORES:
            print(f"| {name} | {rate:,.0f} |")


def counts_up_to(cores: int) -> list[int]:
    """1, 2, 4, ..., and the physical cores, and all."""
    doubled = [2**i for i in range(cores.bit_length())]
    return sorted({*doubled, physical_cores(), cores})


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument(
        "--loader", help="measure this one only, here, with one number of processes"
    )
    parser.add_argument("--loaders", type=lambda text: text.split(";"), default=list(LOADERS))
    parser.add_argument("--processes", type=lambda text: [int(n) for n in text.split(",")])
    parser.add_argument("--images", type=int, default=1024, help="that are made")
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    options.processes = options.processes or counts_up_to(CORES)
    if options.loader:
        print(measure(options.loader, options.folder, options.processes[0], options.seconds))
        sys.stdout.flush()
        os._exit(0)  # Some loaders take long to stop.
    with tempfile.TemporaryDirectory() as name:
        if options.folder is None:
            make_images(Path(name), options.images)
        main(options.folder or Path(name), options)
