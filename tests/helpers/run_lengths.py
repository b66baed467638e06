"""A plain reading of COCO's compressed run lengths, to compare with."""


def run_lengths(counts):
    """Return the run lengths behind COCO's compressed string, one number after another."""
    lengths, position = [], 0
    while position < len(counts):
        number, shift, more = 0, 0, True
        while more:
            group = counts[position] - 48
            number |= (group & 0x1F) << shift
            shift, position, more = shift + 5, position + 1, bool(group & 0x20)
        number -= (1 << shift) if group & 0x10 else 0
        lengths.append(number + lengths[-2] if len(lengths) > 2 else number)
    return lengths
