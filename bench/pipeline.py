"""Images per second of our loader and of a plain torchvision one, on a folder of JPEG photographs."""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from bench import common
from nostalgia.data.folders import scan
from nostalgia.data.resizing import Resizing
from nostalgia.data.stream import Prepared, TaskLoader, View
from nostalgia.errors import NotFoundError, UsageError

ABOUT = """\
Images per second that reach the device, normalised and in batches, by `nostalgia.data.stream.TaskLoader` and by
what most training scripts have: torchvision's ImageFolder under a DataLoader with the transforms of each image
done by its worker. Both read the same files, crop, flip, resize to --image-size and normalise alike:

  train   ours: crop_flip (60 to 100 % of the area, mirrored at random)
          theirs: RandomResizedCrop(scale=(0.6, 1), ratio=(1, 1)), RandomHorizontalFlip, ToTensor, Normalize
  eval    ours: the central square, resized
          theirs: Resize, CenterCrop, ToTensor, Normalize

  dali    with --dali, of NVIDIA DALI on the CPU (pip install nvidia-dali-cuda120), max(1, workers) threads: decoders.image,
          random_resized_crop or resize, crop_mirror_normalize; another decoder and resampling, so not the same pixels

Without --folder the images are crops, 500 x 375 pixels, of the two photographs that come with scikit-learn. Passes
of the two take turns; the fastest of --repeats counts. A pass includes the start of its worker processes where the
loader starts them anew each epoch.
"""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = common.parser(
        "pipeline",
        ABOUT,
        [
            "python -m bench.pipeline --out pipeline.json",
            "python -m bench.pipeline --folder /data/imagenet/val --num-images 2000 --workers 4,8 --device cuda",
            "python -m bench.pipeline --num-images 16 --workers 0 --repeats 1   # seconds",
        ],
    )
    common.add_device(arguments)
    arguments.add_argument("--folder", type=Path, help="<folder>/<class>/*.jpg of your own")
    arguments.add_argument("--num-images", type=int, default=512, help="images a pass (default 512)")
    arguments.add_argument("--image-size", type=int, default=224, help="side fed to the network (default 224)")
    arguments.add_argument("--batch-size", type=int, default=64, help="(default 64)")
    arguments.add_argument("--workers", default="0,1,2", help="numbers of worker processes (default 0,1,2)")
    arguments.add_argument("--dali", action="store_true", help="NVIDIA DALI too, on the CPU")
    arguments.add_argument("--repeats", type=int, default=3, help="passes, of which the fastest (default 3)")
    common.run(benchmark, arguments, argv)


def benchmark(options: argparse.Namespace) -> None:
    device = common.pick_device(options.device)
    try:
        workers = [int(number) for number in options.workers.split(",")]
    except ValueError:
        raise UsageError(f"--workers {options.workers}: whole numbers by commas, such as 0,2,4") from None
    with photographs(options.folder, options.num_images, options.seed) as folder:
        rows = [measure(folder, mode, number, device, options) for mode in ("train", "eval") for number in workers]
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    results = {"benchmark": "pipeline", "bytes": size, "rows": rows}
    common.report(options, device, results, [_table(rows, options)])


def measure(folder: Path, mode: str, workers: int, device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    ours = our_pass(folder, mode, workers, device, options)
    theirs = plain_pass(folder, mode, workers, device, options)
    passes = {"ours": ours, "plain": theirs}
    if options.dali:
        passes["dali"] = dali_pass(folder, mode, workers, device, options)
    rates: dict[str, list[float]] = {name: [] for name in passes}
    for epoch in range(options.repeats + 1):  # the first warms up: files into memory, workers started
        for name, run_pass in passes.items():
            common.synchronise(device)
            start = time.perf_counter()
            count = run_pass(epoch)
            common.synchronise(device)
            if epoch > 0:
                rates[name].append(count / (time.perf_counter() - start))
    best = {name: max(values) for name, values in rates.items()}
    return {
        "mode": mode,
        "workers": workers,
        "images": options.num_images,
        **{f"{name}_per_second": rate for name, rate in best.items()},
        "ratio": best["ours"] / best["plain"],
        "all": rates,
    }


def our_pass(
    folder: Path, mode: str, workers: int, device: torch.device, options: argparse.Namespace
) -> Callable[[int], int]:
    images = Prepared([scan("photographs", folder)], [()], Resizing(options.image_size))
    loader = TaskLoader(
        images,
        View(Resizing(options.image_size), MEAN, STD, device),
        name="bench",
        per_device_batch_size=options.batch_size,
        train=mode == "train",
        seed=options.seed,
        num_workers=workers,
        augment="crop_flip",
    )

    def run(epoch: int) -> int:
        return sum(len(batch) for step in loader.epoch(epoch) for batch in step.micro_batches)

    return run


def plain_pass(
    folder: Path, mode: str, workers: int, device: torch.device, options: argparse.Namespace
) -> Callable[[int], int]:
    size = options.image_size
    if mode == "train":
        steps = [transforms.RandomResizedCrop(size, scale=(0.6, 1.0), ratio=(1.0, 1.0))]
        steps += [transforms.RandomHorizontalFlip()]
    else:
        steps = [transforms.Resize(size), transforms.CenterCrop(size)]
    steps += [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    loader = DataLoader(
        ImageFolder(str(folder), transforms.Compose(steps)),
        batch_size=options.batch_size,
        shuffle=mode == "train",
        num_workers=workers,
        pin_memory=device.type == "cuda",
        persistent_workers=mode == "train" and workers > 0,  # as ours
        prefetch_factor=4 if workers else None,
    )

    def run(epoch: int) -> int:
        count = 0
        for images, labels in loader:
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            count += len(labels)
        return count

    return run


def dali_pass(
    folder: Path, mode: str, workers: int, device: torch.device, options: argparse.Namespace
) -> Callable[[int], int]:
    try:
        from nvidia.dali import fn, pipeline_def, types
        from nvidia.dali.plugin.base_iterator import LastBatchPolicy
        from nvidia.dali.plugin.pytorch import DALIClassificationIterator
    except ImportError as error:
        raise UsageError(f"--dali: {error}; pip install nvidia-dali-cuda120") from None
    size, train = options.image_size, mode == "train"

    @pipeline_def(batch_size=options.batch_size, num_threads=max(1, workers), device_id=None, seed=options.seed)
    def pipeline() -> Any:
        files, labels = fn.readers.file(file_root=str(folder), random_shuffle=train, name="files")
        images = fn.decoders.image(files, device="cpu", output_type=types.RGB)
        if train:
            images = fn.random_resized_crop(images, size=size, random_area=(0.6, 1.0), random_aspect_ratio=(1.0, 1.0))
        else:
            images = fn.resize(images, resize_shorter=size)
        mirror = fn.random.coin_flip() if train else 0
        mean, deviation = [255 * m for m in MEAN], [255 * s for s in STD]
        return fn.crop_mirror_normalize(images, crop=(size, size), mirror=mirror, mean=mean, std=deviation), labels

    built = pipeline()
    built.build()
    loader = DALIClassificationIterator(
        built, reader_name="files", last_batch_policy=LastBatchPolicy.PARTIAL, auto_reset=True
    )

    def run(epoch: int) -> int:
        return sum(len(batch[0]["data"].to(device)) for batch in loader)

    return run


@contextmanager
def photographs(folder: Path | None, count: int, seed: int) -> Iterator[Path]:
    """``count`` JPEG files in class folders: links to those of ``folder``, or crops of scikit-learn's photographs."""
    with tempfile.TemporaryDirectory() as temporary:
        target = Path(temporary)
        if folder is None:
            write_photographs(target, count, seed)
        else:
            _link(folder, target, count)
        yield target


def write_photographs(target: Path, count: int, seed: int) -> None:
    """``count`` crops of 500 x 375 pixels as JPEG of quality 90, in ``target``/flower and ``target``/china."""
    from sklearn.datasets import load_sample_images

    random = np.random.default_rng(seed)
    originals = dict(zip(("china", "flower"), load_sample_images().images, strict=True))
    for name in originals:
        (target / name).mkdir()
    for number in range(count):
        name = ("china", "flower")[number % 2]
        pixels = originals[name]
        top, left = random.integers(pixels.shape[0] - 375 + 1), random.integers(pixels.shape[1] - 500 + 1)
        Image.fromarray(pixels[top : top + 375, left : left + 500]).save(
            target / name / f"{number:05d}.jpg", quality=90
        )


def _link(folder: Path, target: Path, count: int) -> None:
    """Links to the first ``count`` images of ``folder`` in a random order fixed once and for all."""
    found = scan("folder", folder)
    if len(found) < count:
        raise NotFoundError(f"--folder {folder}: {len(found)} images, fewer than --num-images {count}")
    chosen = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))[:count].tolist()
    for index in chosen:
        path = Path(found.describe(index)).resolve()
        place = target / str(int(found.labels[index]))
        place.mkdir(exist_ok=True)
        try:
            (place / f"{index}{path.suffix}").symlink_to(path)
        except OSError:  # a file system without links
            shutil.copy(path, place / f"{index}{path.suffix}")


def _table(rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> Any:
    title = f"Images per second at {options.image_size} px, batches of {options.batch_size}"
    dali = ["DALI"] if options.dali else []
    result = common.table(title, ["mode", "workers", "ours", "plain torchvision", "ratio", *dali])
    for row in rows:
        result.add_row(
            row["mode"],
            str(row["workers"]),
            f"{row['ours_per_second']:.0f}",
            f"{row['plain_per_second']:.0f}",
            f"{row['ratio']:.2f}",
            *([f"{row['dali_per_second']:.0f}"] if dali else []),
        )
    return result


if __name__ == "__main__":
    main()
