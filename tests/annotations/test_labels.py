"""Labels and the categories they stand for, against a plain dictionary."""

import numpy as np
import pytest

from annotations.labels import LabelMap, alike_names, bare_name

# Ids in no order, with a 0 as some tools write it, and a label that no category has.
LABELS = LabelMap((30, 0, -1, 7), ("car", "person", "class 3", "dog"), ((7, "d"), (30, "c")))


def test_labels_and_categories_are_each_others_inverse():
    plain = {30: 1, 0: 2, 7: 4}
    ids = np.array([7, 30, 0, 0, 7, 30])
    labels = LABELS.labels_of(ids)
    assert labels.tolist() == [plain[i] for i in ids.tolist()] and labels.dtype == np.int64
    assert LABELS.categories_of(labels).tolist() == ids.tolist()
    assert LABELS.categories_of(np.array([0, 3])).tolist() == [-1, -1]  # background, and the one without a category
    assert LABELS.labels_of(np.zeros(0, int)).tolist() == []


def test_background_counts_as_a_class_and_has_no_name():
    assert LABELS.num_classes == 5 and LABELS.class_names == ("car", "person", "dog")


@pytest.mark.parametrize("unknown", [-2, 1, 29, 31])
def test_a_category_that_no_label_has_is_an_error(unknown):
    """Below, between and above the known ones; one among known ones is enough."""
    with pytest.raises(AssertionError):
        LABELS.labels_of(np.array([7, unknown, 30]))


def test_categories_are_numbered_from_one_with_the_texts_of_their_own_ids():
    labels = LabelMap.contiguous([(3, "a"), (8, "b")], [(3, "three"), (5, "of an image")])
    assert labels == LabelMap((3, 8), ("a", "b"), ((3, "three"),))
    assert labels.labels_of(np.array([8, 3])).tolist() == [2, 1]


def test_a_checkpoint_gives_back_the_labels():
    assert LabelMap.from_plain(LABELS.to_plain()) == LABELS
    older = {name: value for name, value in LABELS.to_plain().items() if name != "category_texts"}
    assert LabelMap.from_plain(older) == LabelMap(LABELS.category_ids, LABELS.names)


def test_names_are_alike_where_only_case_blanks_dashes_or_an_added_id_differ():
    assert bare_name("  Traffic_-light ") == bare_name("traffic light")
    names = ["dog", "Traffic light", "cat (id 4)", "traffic-light", "cat (id -2)", "dogs", "dog"]
    assert alike_names(names) == [["Traffic light", "traffic-light"], ["cat (id -2)", "cat (id 4)"]]
