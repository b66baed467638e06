"""Videos: frames in, upright and with their times, and frames out as an mp4. Never more than a few are in memory.

Read and written by PyAV, which is loaded when the first video is opened: pictures do without it.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any

import numpy as np

VIDEO_SUFFIXES = frozenset(
    [".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".flv", ".ts", ".mts", ".m2ts", ".3gp"]
    + [".ogv"]
)

# Times of frames are kept to this part of a second, the usual clock of video files: a multiple of all common rates.
CLOCK = 90_000

# Quality of the h264 that is written: 18 is as good as the eye can tell, 23 the encoder's default.
QUALITY = "20"


class VideoError(ValueError):
    """A file that cannot be read as a video, or no further; the text says why, without the file's name."""


@dataclass(frozen=True)
class Frame:
    """One picture of a video.

    Attributes:
        number: Its position in the video, from 0.
        seconds: When it is shown, from the video's beginning.
        pixels: uint8 [H, W, 3], RGB, upright.
    """

    number: int
    seconds: float
    pixels: np.ndarray


def is_video_name(path: Path) -> bool:
    """Tell whether a file is a video by its name."""
    return PurePosixPath(path.name).suffix.lower() in VIDEO_SUFFIXES


def load_av() -> ModuleType:
    """Import PyAV.

    Raises:
        ValueError: It is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise ValueError(f"videos need PyAV ({error}): pip install av") from None
    av.logging.set_level(av.logging.PANIC)  # what is wrong with a file is said once, by us
    return av


class VideoReader:
    """A video file, open for reading; use it in a ``with`` block.

    Attributes:
        rate: Frames per second on average.
        num_frames: How many frames there are, as far as the file knows; None where it does not.

    Raises:
        VideoError: It cannot be read, or has no picture in it.
    """

    def __init__(self, path: Path) -> None:
        self._av = load_av()
        if path.is_file() and path.stat().st_size == 0:
            raise VideoError("the file is empty")
        with self._errors_named():
            self._container: Any = self._av.open(str(path))
        if not self._container.streams.video:
            self._container.close()
            raise VideoError("no video stream in it")
        self._stream = self._container.streams.video[0]
        self._stream.thread_type = "AUTO"
        self.rate = Fraction(self._stream.average_rate or self._stream.guessed_rate or 25)
        self.num_frames = self._count()

    def _count(self) -> int | None:
        """Return how many frames the file says that it has, or how many its length in seconds allows."""
        if self._stream.frames:
            return int(self._stream.frames)
        if self._container.duration:
            return max(1, round(self._container.duration / self._av.time_base * self.rate))
        return None

    def __enter__(self) -> "VideoReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._container.close()

    def frames(self, every: int = 1) -> Iterator[Frame]:
        """Yield the first frame, and from there each one that comes ``every`` frames after the last.

        Raises:
            VideoError: The file is broken from here on, or there is no frame in it.
        """
        number, start, seconds = -1, None, -1.0
        with self._errors_named():
            for number, frame in enumerate(self._container.decode(self._stream)):
                time = frame.time
                if time is not None:
                    start = time if start is None else start
                    seconds = max(time - start, seconds + 1 / CLOCK)  # never back, as no file can be played
                else:
                    seconds = number / float(self.rate)
                if number % every == 0:
                    yield Frame(number, seconds, _upright(frame))
        if number < 0:
            raise VideoError("no frame in it")

    @contextlib.contextmanager
    def _errors_named(self) -> Iterator[None]:
        """Turn PyAV's errors into ours."""
        try:
            yield
        except self._av.error.FFmpegError as error:
            raise VideoError(f"not readable as a video: {error.strerror or error}") from None


def _upright(frame: Any) -> np.ndarray:
    """Return a frame's pixels turned as players turn them, uint8 [H, W, 3]."""
    pixels = frame.to_ndarray(format="rgb24")
    return np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90)))


class VideoWriter:
    """An mp4 (h264) that frames are added to; use it in a ``with`` block, after which the file is whole.

    h264 has even sides only: an odd one is made longer by its last row or column. The first frame decides the size.

    Args:
        path: The file.
        rate: Frames per second, on average: what players go by where they ignore the times of frames.
    """

    def __init__(self, path: Path, rate: Fraction) -> None:
        self._av = load_av()
        with self._plain_errors():
            self._container: Any = self._av.open(str(path), "w", format="mp4")
        self._rate = rate.limit_denominator(1001)
        self._stream: Any = None
        self._last = -1

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, *_: object) -> None:
        with self._plain_errors():
            try:
                if self._stream is not None:
                    self._container.mux(self._stream.encode(None))
            finally:
                self._container.close()

    def add(self, pixels: np.ndarray, seconds: float) -> None:
        """Add a frame, uint8 [H, W, 3], that is shown at ``seconds`` from the beginning.

        Raises:
            OSError: It cannot be written.
        """
        height, width = pixels.shape[:2]
        padded = np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        with self._plain_errors():
            if self._stream is None:
                self._stream = self._start(*padded.shape[:2])
            frame = self._av.VideoFrame.from_ndarray(padded, format="rgb24")
            self._last = max(round(seconds * CLOCK), self._last + 1)
            frame.pts, frame.time_base = self._last, Fraction(1, CLOCK)
            self._container.mux(self._stream.encode(frame))

    @contextlib.contextmanager
    def _plain_errors(self) -> Iterator[None]:
        """Turn PyAV's errors, whose file names nobody can set, into the system's own."""
        try:
            yield
        except self._av.error.FFmpegError as error:
            raise OSError(error.errno, error.strerror) from None

    def _start(self, height: int, width: int) -> Any:
        stream = self._container.add_stream("h264", rate=self._rate, options={"crf": QUALITY, "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.time_base = Fraction(1, CLOCK)
        stream.codec_context.thread_count = 2
        # Not left to the first packet: after a header that cannot be written, more packets and the end crash.
        self._container.start_encoding()
        return stream
