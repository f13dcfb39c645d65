"""How many pictures a second are read, decoded, randomly cropped to 224x224 and mirrored.

    pip install -e . tensorflow-cpu timm torchvision
    python benchmarks/data.py [FOLDER]

FOLDER holds JPEGs in class folders; without it, 1,024 pictures of 500x375 are made. Every loader
gets the same files and all cores, gives batches of 128 for the same time, and runs in a process of
its own, in turns, so that whatever else the machine does slows all alike. The figure is the median
of the rounds; the first batches of each run don't count.

"decode and resize alone" is what all cores manage with no loader around it; once more without
what the system takes for giving each picture fresh memory.
"""

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

BATCH, SECONDS, ROUNDS, WARM_UP = 128, 4.0, 3, 4
CORES = len(os.sched_getaffinity(0))


def ours(folder: Path, levels: bool = True, **options) -> Iterator[int]:
    """`data.train_batches`, as training uses it: whole grey levels, normalised on the device."""
    from vit_jax import data

    source = data.open_source(str(folder), "train+test")
    preprocess = data.parse("inception_crop(224)|flip|value_range(-1, 1)")
    whole_levels = preprocess.to_levels()
    assert whole_levels is not None
    if levels:
        preprocess, _ = whole_levels
    for batch in data.train_batches(source, preprocess, batch_size=BATCH, seed=0, **options):
        yield len(batch["image"])


def ours_processes(folder: Path) -> Iterator[int]:
    """The same by worker processes."""
    return ours(folder, workers=CORES)


def ours_float32(folder: Path) -> Iterator[int]:
    """The original's unrounded pictures, normalised by the threads."""
    return ours(folder, levels=False)


def tf_data(folder: Path) -> Iterator[int]:
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
    dataset = dataset.map(load, num_parallel_calls=tf.data.AUTOTUNE)
    for batch in dataset.batch(BATCH).prefetch(tf.data.AUTOTUNE):
        yield len(batch.numpy())


def torchvision_loader(folder: Path) -> Iterator[int]:
    """torch's DataLoader with torchvision's decoder and transforms, a worker a core."""
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
    return _torch_batches(dataset)


def timm_loader(folder: Path) -> Iterator[int]:
    """timm's dataset, transforms and collation (Pillow, uint8), a worker a core."""
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
    return _torch_batches(dataset, fast_collate)


def _torch_batches(dataset, collate=None) -> Iterator[int]:
    from torch.utils.data import DataLoader, RandomSampler

    sampler = RandomSampler(dataset, replacement=True, num_samples=10**7)
    loader = DataLoader(
        dataset,
        BATCH,
        sampler=sampler,
        num_workers=CORES,
        collate_fn=collate,
        drop_last=True,
    )
    for images, _ in loader:
        yield len(images)


def decode_and_resize_alone(folder: Path) -> Iterator[int]:
    """OpenCV in as many threads as cores, on files that are in memory, the results thrown away."""
    import threading

    import cv2

    cv2.setNumThreads(0)
    files = [np.frombuffer(f.read_bytes(), np.uint8) for f in sorted(folder.glob("*/*.jpg"))]
    counts = [0] * CORES

    def work(thread: int) -> None:
        for file in itertools.cycle(files):
            cv2.resize(cv2.imdecode(file, cv2.IMREAD_COLOR_RGB), (224, 224))
            counts[thread] += 1

    for thread in range(CORES):
        threading.Thread(target=work, args=(thread,), daemon=True).start()
    before = 0
    while True:
        time.sleep(0.1)
        now = sum(counts)
        yield now - before
        before = now


def decode_and_resize_in_kept_memory(folder: Path) -> Iterator[int]:
    """The same where glibc keeps what was freed."""
    import ctypes

    libc = ctypes.CDLL(None)
    libc.mallopt(-4, 0)  # M_MMAP_MAX
    libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    return decode_and_resize_alone(folder)


LOADERS: dict[str, Callable[[Path], Iterator[int]]] = {
    "ours, uint8 (the default)": ours,
    "ours, uint8, worker processes": ours_processes,
    "ours, float32": ours_float32,
    "tf.data": tf_data,
    "torchvision": torchvision_loader,
    "timm": timm_loader,
    "decode and resize alone": decode_and_resize_alone,
    "decode and resize alone, memory kept": decode_and_resize_in_kept_memory,
}


def measure(name: str, folder: Path) -> float:
    """Pictures a second of a loader that has warmed up."""
    batches = LOADERS[name](folder)
    for _ in range(WARM_UP):
        next(batches)
    count, start = 0, time.perf_counter()
    while (seconds := time.perf_counter() - start) < SECONDS:
        count += next(batches)
    return count / seconds


def make_pictures(folder: Path, count: int = 1024) -> None:
    """Pictures with the detail of photos, smooth with some noise: 50 to 60 KB each as JPEG."""
    import cv2

    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = rng.uniform(0, 255, (12, 16, 3)).astype(np.float32)
        fine = rng.normal(0, 9, (375, 500, 3))
        picture = cv2.resize(coarse, (500, 375), interpolation=cv2.INTER_CUBIC) + fine
        file = folder / "ab"[i % 2] / f"{i:04}.jpg"
        file.parent.mkdir(exist_ok=True)
        levels = picture.clip(0, 255).astype(np.uint8)
        cv2.imwrite(str(file), levels, [cv2.IMWRITE_JPEG_QUALITY, 85])


def main(folder: Path) -> None:
    """Prints a table."""
    rates: dict[str, list[float]] = {name: [] for name in LOADERS}
    for _ in range(ROUNDS):
        for name in LOADERS:
            command = [sys.executable, __file__, str(folder), name]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:
                rates[name].append(json.loads(done.stdout.splitlines()[-1]))
            elif not rates[name]:
                print(f"{name}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
    files = list(folder.glob("*/*.jpg"))
    size = statistics.mean(f.stat().st_size for f in files)
    print(f"{len(files):,} JPEGs of {size / 1e3:.0f} KB, {CORES} cores\n")
    medians = {name: statistics.median(values) for name, values in rates.items() if values}
    best = medians["ours, uint8 (the default)"]
    print("| loader | pictures a second | ours is so many times as fast |")
    print("| --- | --- | --- |")
    for name, rate in medians.items():
        print(f"| {name} | {rate:,.0f} | {best / rate:.2f} |")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(measure(sys.argv[2], Path(sys.argv[1])))
        sys.stdout.flush()
        os._exit(0)  # Some loaders take long to stop.
    if len(sys.argv) == 2:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as name:
            make_pictures(Path(name))
            main(Path(name))
