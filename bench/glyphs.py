"""Real images anybody can build: letters of several scripts in every font that the system's font packages bring.

python -m bench.glyphs OUT          OUT/latin_upper/{train,val}/<letter>/*.png and the like, 56 x 56 pixels

A class is a letter, an image one font's form of it; fonts are split over train and val, so that validation is on fonts
never seen; `others` are there to pretrain on. Debian's fonts-dejavu, fonts-freefont-ttf, fonts-cmu, fonts-urw-base35,
fonts-lato, fonts-linuxlibertine and fonts-ebgaramond give 61 training and 23 validation images a letter.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import sys
from collections.abc import Iterable
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

FONTS = Path("/usr/share/fonts")
SETS = {
    "latin_upper": "ABCDEFGHIJKLMNOPQRST",
    "latin_lower": "abdefghijkmnqrtuwxyz",
    "greek": "ΓΔΘΛΞΠΣΦΨΩαβγδεζλμξφ",
    "cyrillic": "БГДЖЗИЙЛПФЦЧШЩЫЭЮЯжд",
    "symbols": "&@#$%§€£?!+=<>{}[]*~",
    "others": "UVWXYZcovps0123456789ÆÐØÞßæðøþŁłŒœ¿¥©®±¶µ÷×ƒ†‡‰∂∑∏∫√∞≈≠≤≥◊жийлфцщъэюя",  # noqa: RUF001
}
SIZE = 56


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.glyphs", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--fonts", type=Path, default=FONTS, help="default: %(default)s")
    parser.add_argument(
        "--per-class", type=int, default=75, help="training images a letter, at most; default: %(default)s"
    )
    options = parser.parse_args(arguments)
    fonts = sorted(p for ending in ("*.ttf", "*.otf", "*.pfb", "*.t1") for p in options.fonts.rglob(ending))
    if not fonts:
        print(f"error: {options.fonts}: no fonts; install font packages, such as fonts-dejavu", file=sys.stderr)
        return 3
    for name, letters in SETS.items():
        for number, letter in enumerate(letters):
            write_letter(options.out / name, f"{number:02d}", letter, fonts, options.per_class)
        counts = [len(list((options.out / name / part).rglob("*.png"))) for part in ("train", "val")]
        print(f"{name}: {len(letters)} classes, {counts[0]} training and {counts[1]} validation images")
    return 0


def write_letter(folder: Path, label: str, letter: str, fonts: Iterable[Path], most: int) -> None:
    """Images of one letter, each different; every fourth font is for validation."""
    seen: set[bytes] = set()
    written = {"train": 0, "val": 0}
    for font in fonts:
        part = "val" if hashlib.sha256(font.name.encode()).digest()[0] % 4 == 0 else "train"
        room = most if part == "train" else most // 3
        image = draw(font, letter) if written[part] < room else None
        if image is None or image.tobytes() in seen:
            continue
        seen.add(image.tobytes())
        target = folder / part / label / f"{font.stem}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        image.save(target)
        written[part] += 1


def draw(font: Path, letter: str) -> Image.Image | None:
    """The letter in dark on a light ground, at a size and place of the font's own; None where the font lacks it."""
    chance = random.Random(f"{font.name} {letter}")
    try:
        face = ImageFont.truetype(str(font), chance.randint(30, 44))
        missing = face.getmask("\uffff").getbbox(), bytes(face.getmask("\uffff"))
        mask = face.getmask(letter)
        if mask.getbbox() is None or (mask.getbbox(), bytes(mask)) == missing:
            return None
    except OSError:
        return None
    ground = chance.randint(190, 255)
    image = Image.new("RGB", (SIZE, SIZE), (ground, ground, ground))
    place = (SIZE / 2 + chance.randint(-5, 5), SIZE / 2 + chance.randint(-5, 5))
    ink = tuple(chance.randint(0, 110) for _ in range(3))
    ImageDraw.Draw(image).text(place, letter, font=face, fill=ink, anchor="mm")
    return image


if __name__ == "__main__":
    sys.exit(main())
