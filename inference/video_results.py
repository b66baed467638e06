"""A detector on videos: frames through the model, results written as they come, an mp4 with what was found.

While the model works on some frames the next ones are decoded and those before are drawn and encoded: no more than
three batches are in memory, however long the video.
"""

import contextlib
import itertools
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO

import numpy as np
from tqdm import tqdm

from annotations.record_reader import Record
from files import write_aside
from inference.detector import Detector
from inference.found import Found
from inference.picture_files import MAX_BATCH_PIXELS
from inference.video import Frame, VideoError, VideoReader, VideoWriter
from models.resize import describe_vanishing, leaves_nothing
from pixels.image_files import printable

# (the video, the frame's id, the frame, what was found in it)
Report = Callable[[Path, int, Frame, Found], None]


class VideoResults:
    """What became of videos.

    Attributes:
        videos: An entry per video of which frames were looked at.
        skipped: Those that could not be read, or not to their end, with the reason.
        num_frames: Frames that were looked at.
    """

    def __init__(self, folder: Path, first_id: int) -> None:
        """Start with nothing.

        Args:
            folder: Takes the overlays and, for a while, a file of frames.
            first_id: Id of the first frame.
        """
        self.videos: list[Record] = []
        self.skipped: list[Record] = []
        self.num_frames = 0
        self._folder, self._first_id = folder, first_id
        self._frames: IO[str] = tempfile.TemporaryFile("w+", dir=folder)  # noqa: SIM115 - closes with this object

    def add(
        self,
        detector: Detector,
        path: Path,
        report: Report,
        *,
        every: int,
        batch_size: int,
        overlay: str | None,
        stop: Callable[[], bool],
    ) -> None:
        """Look at one video.

        Args:
            detector: Finds the objects.
            path: The video.
            report: Called for each frame.
            every: Take every so many-th frame.
            batch_size: Frames that the model takes at a time, at most.
            overlay: Name of the mp4 with what was found, in the folder; None writes none.
            stop: Whether to end after the frames at hand.

        Raises:
            OSError: A file cannot be written.
        """
        before = self.num_frames
        entry: Record = {"file_name": str(path)}
        failure: OSError | None = None
        try:
            with (
                VideoReader(path) as reader,
                tqdm(desc=printable(path.name), total=_expected(reader, every), unit="frame", disable=None) as bar,
            ):
                entry["frames_per_second"] = round(float(reader.rate), 3)
                target = None if overlay is None else self._folder / overlay
                for frame, found in _over_frames(detector, reader, every, batch_size, target, stop):
                    height, width = found.size
                    record = {"id": self._first_id + self.num_frames, "file_name": str(path), "frame": frame.number}
                    record |= {"seconds": round(frame.seconds, 6), "height": height, "width": width}
                    self._frames.write(json.dumps(record) + "\n")
                    report(path, self._first_id + self.num_frames, frame, found)
                    self.num_frames += 1
                    bar.update()
        except VideoError as error:
            done = self.num_frames - before
            self._skip(path, f"broken after {done} frames: {error}" if done else str(error))
        except OSError as error:
            failure = error
        if self.num_frames > before:
            entry |= {"num_frames": self.num_frames - before}
            entry |= {} if overlay is None or failure is not None else {"overlay": overlay}
            entry |= {"stopped": True} if stop() or failure is not None else {}
            self.videos.append(entry)
        if failure is not None:
            raise failure

    def not_reached(self, videos: Sequence[Path]) -> list[Record]:
        """Return an entry for each of these videos that is in neither list."""
        done = {entry["file_name"] for entry in self.videos + self.skipped}
        return [{"file_name": str(path)} for path in videos if str(path) not in done]

    def _skip(self, path: Path, reason: str) -> None:
        self.skipped.append({"file_name": str(path), "reason": reason})
        with contextlib.suppress(BrokenPipeError):  # images.json says it too
            tqdm.write(f"skipped: {printable(str(path))}: {reason}", file=sys.stderr)

    def write(self, content: Record, file: IO[str]) -> None:
        """Write the content of ``images.json`` with ``videos`` and their ``frames``, which stay out of memory."""
        text = json.dumps({**content, "videos": self.videos}, indent=1)
        file.write(text[: text.rindex("\n}")] + ',\n "frames": [')
        self._frames.seek(0)
        for n, line in enumerate(self._frames):
            file.write(("\n  " if n == 0 else ",\n  ") + line.rstrip("\n"))
        file.write("\n ]\n}")


def _expected(reader: VideoReader, every: int) -> int | None:
    """Return how many frames will probably be looked at."""
    return None if reader.num_frames is None else -(-reader.num_frames // every)


def _over_frames(
    detector: Detector,
    reader: VideoReader,
    every: int,
    batch_size: int,
    overlay: Path | None,
    stop: Callable[[], bool],
) -> Iterator[tuple[Frame, Found]]:
    """Yield the frames of a video and what was found in each; the mp4 is whole when the last one is out."""
    broken: VideoError | None = None
    batches = _batches(reader.frames(every), batch_size)
    with contextlib.ExitStack() as stack:
        decoding, drawing = (stack.enter_context(ThreadPoolExecutor(1)) for _ in range(2))
        writer: VideoWriter | None = None
        drawn: Future[None] | None = None
        coming = decoding.submit(next, batches, None)
        while not stop():
            try:
                batch = coming.result()
            except VideoError as error:
                broken = error
                break
            if batch is None:
                break
            coming = decoding.submit(next, batches, None)
            results = _find(detector, batch, batch_size)
            if drawn is not None:
                drawn.result()
            if overlay is not None:
                if writer is None:
                    overlay.parent.mkdir(exist_ok=True)
                    temporary = stack.enter_context(write_aside(overlay))
                    writer = stack.enter_context(VideoWriter(temporary, reader.rate / every))
                drawn = drawing.submit(_draw, writer, batch, results)
            yield from zip(batch, results)
        coming.exception()  # waits: the file is closed after it
        if drawn is not None:
            drawn.result()
    if broken is not None:
        raise broken


def _batches(frames: Iterator[Frame], batch_size: int) -> Iterator[list[Frame]]:
    """Yield frames in lists of ``batch_size``, or of fewer where they have more than `MAX_BATCH_PIXELS` together.

    What comes before an error comes out before it.
    """
    for first in frames:
        height, width = first.pixels.shape[:2]
        batch, error = [first], None
        try:
            for frame in itertools.islice(frames, max(1, min(batch_size, MAX_BATCH_PIXELS // (height * width))) - 1):
                batch.append(frame)
        except VideoError as raised:
            error = raised
        yield batch
        if error is not None:
            raise error


def _find(detector: Detector, batch: Sequence[Frame], batch_size: int) -> list[Found]:
    """Return what is found in each frame."""
    for height, width in {frame.pixels.shape[:2] for frame in batch}:
        if leaves_nothing(np.array(height), np.array(width), detector.trained.spec):
            raise VideoError(describe_vanishing(height, width))
    return detector([frame.pixels for frame in batch], batch_size=batch_size)


def _draw(writer: VideoWriter, batch: Sequence[Frame], results: Sequence[Found]) -> None:
    """Add frames to the mp4 with what was found drawn into them."""
    for frame, found in zip(batch, results):
        writer.add(np.asarray(found.draw()), frame.seconds)
