"""How often the pictures of rare classes are drawn in an epoch: LVIS's repeat factors.

Gupta, Dollar and Girshick, LVIS (2019), https://arxiv.org/abs/1908.03195, equation 1: with f(c) the share of pictures
that show class c, and t the threshold, r(c) = max(1, sqrt(t / f(c))). A picture is drawn as often as its rarest class
asks, and once if it shows none.
"""

import logging
from dataclasses import dataclass

import numpy as np

from annotations.labels import LabelMap
from loading.split import Split
from loading.trainable import is_trained_on
from models.architectures import ModelSpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Repeats:
    """Factors, and what they come to.

    Attributes:
        threshold: ``--repeat-threshold``.
        pictures: int64 [C], pictures with an object of each class.
        of_class: float64 [C], r(c); 1 for a class without pictures.
        of_picture: float64 [N], the largest factor of the classes that a picture shows; 1 for one without objects.
        drawn: float64 [C], how many pictures with an object of each class an epoch draws, on average.
    """

    threshold: float
    pictures: np.ndarray
    of_class: np.ndarray
    of_picture: np.ndarray
    drawn: np.ndarray

    @classmethod
    def of(cls, threshold: float, pictures: np.ndarray, classes: np.ndarray, num: tuple[int, int]) -> "Repeats":
        """Return the factors.

        Args:
            threshold: t.
            pictures: int64 [P], the picture of each object, from 0.
            classes: int64 [P], the class of each object, from 0.
            num: (number of pictures N, number of classes C).
        """
        num_pictures, num_classes = num
        pictures, classes = np.divmod(np.unique(pictures * num_classes + classes), num_classes)  # each pair once
        counts = np.bincount(classes, minlength=num_classes)
        shares = np.where(counts > 0, counts, np.inf) / num_pictures
        of_class = np.maximum(1.0, np.sqrt(threshold / shares))
        of_picture = np.ones(num_pictures)
        np.maximum.at(of_picture, pictures, of_class[classes])
        drawn = np.bincount(classes, of_picture[pictures], minlength=num_classes)
        return cls(threshold, counts, of_class, of_picture, drawn)

    def log(self) -> None:
        """Say how many pictures come more than once, and warn where none does."""
        num_pictures, num_repeated = len(self.of_picture), np.count_nonzero(self.of_picture > 1)
        if num_repeated:
            text = "an epoch draws %.0f pictures of %d: --repeat-threshold %g repeats %d with rare classes"
            logger.info(text, self.of_picture.sum(), num_pictures, self.threshold, num_repeated)
        else:
            rarest = self.pictures[self.pictures > 0].min(initial=num_pictures)
            text = "--repeat-threshold %g repeats no picture: each class is on at least %.2g of them"
            logger.warning(text, self.threshold, rarest / num_pictures)

    def format_rows(self, names: list[str]) -> list[str]:
        """Return a few words on every class: pictures, how many of them are drawn, and the factor."""
        columns = (self.pictures.tolist(), self.drawn.tolist(), self.of_class.tolist())
        return [
            f"{name} {count} -> {drawn:.0f} (x {factor:.2f})" for name, count, drawn, factor in zip(names, *columns)
        ]


def find_repeats(split: Split, label_map: LabelMap, spec: ModelSpec, images: np.ndarray, threshold: float) -> Repeats:
    """Return the factors of the pictures to train on; only objects that are trained on count.

    Args:
        split: Holds the images and their objects.
        label_map: Classes of the model.
        spec: Says which objects its resize leaves.
        images: Which images are trained on, int64 [N].
        threshold: ``--repeat-threshold``.
    """
    annotations = split.annotations
    chosen = is_trained_on(split, label_map, spec, images)
    position = np.zeros(len(annotations), dtype=np.int64)
    position[images] = np.arange(len(images))
    classes, shape = annotations.object_classes()[chosen], (len(images), len(annotations.categories))
    return Repeats.of(threshold, position[annotations.object_images()[chosen]], classes, shape)
