"""A data set of one's own: a folder of images a class, here of scikit-learn's digits."""

from pathlib import Path

from PIL import Image
from sklearn.datasets import load_digits

digits = load_digits()
for number, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
    folder = Path("my_images") / ("even" if label % 2 == 0 else "odd")
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray((image * 15.9).astype("uint8")).resize((16, 16)).save(folder / f"{number}.png")
