"""The shapes that a picture's text can have: flat, rows, tiles, slices. Which processor has which is in `picture_markers`.

flat     <start> T T T ... T <end>                         LLaVA, Qwen, Gemma, InternVL
rows     T T T <break> T T T <break> T T T <end>           Pixtral: a marker after each row of tokens
tiles    <r1c1> T ... T <r1c2> T ... T <whole> T ... T     Idefics3, LFM2-VL: tiles, then the whole picture small
slices   <image> T ... T </image> <slice> T ... </slice>   MiniCPM-V: the whole picture small, then its slices
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from ...graphs.errors import GuardError


@dataclass(frozen=True)
class PictureTokens:
    """The image tokens of one picture.

    Attributes:
        count: how many, all parts together.
        grid: rows and columns of its tiles; for the layout `rows`, of its tokens. `None`: the picture is not cut.
        sizes: relative sizes of its parts in the order in which the vision encoder gives them: the tiles in reading order and,
            where there is one, the whole picture before or behind them. Empty: all parts have the same size.
    """

    count: int
    grid: tuple[int, int] | None = None
    sizes: tuple[int, ...] = ()

    def counts(self, parts: int) -> list[int]:
        """Tokens of each of so many parts.

        Raises:
            GuardError: the tokens cannot be divided like that.
        """
        sizes = self.sizes or (1,) * parts
        total = sum(sizes)
        if len(sizes) != parts or any(self.count * size % total for size in sizes):
            raise GuardError(
                f"{self.count} image tokens cannot be divided into {parts} parts of sizes {', '.join(map(str, sizes))}; "
                "copy the image processor's config that belongs to this model"
            )
        return [self.count * size // total for size in sizes]


@dataclass(frozen=True)
class Flat:
    """All image tokens in a row between two texts; a picture that was cut looks the same."""

    text: str = "{tokens}"

    def write(self, picture: PictureTokens, image: str, markers: Mapping[str, str]) -> str:
        return self.text.format(tokens=image * picture.count, **markers)


@dataclass(frozen=True)
class Rows:
    """A marker after every row of image tokens, another one after the last row."""

    after_row: str
    after_last: str

    def write(self, picture: PictureTokens, image: str, markers: Mapping[str, str]) -> str:
        rows, columns = picture.grid or (1, picture.count)
        if rows * columns != picture.count:
            raise GuardError(
                f"the vision encoder gives {picture.count} rows for {rows} x {columns} image tokens; "
                "copy the image processor's config that belongs to this model"
            )
        row = image * columns
        return (row + self.after_row.format(**markers)) * (rows - 1) + row + self.after_last.format(**markers)


@dataclass(frozen=True)
class Tiles:
    """A text for each tile, and one for the small copy of the whole picture.

    Attributes:
        tile: of one tile; `{tokens}`, `{row}`, `{column}` and `{number}` (all from 1) are filled in, and the markers.
        whole: of the small copy; empty where no tile is one.
        alone: of a picture that is not cut.
        start, end: around everything.
        between_columns: between two tiles of a row.
        after_row: behind each row; `between_rows`: behind each row but the last.
        whole_first: whether the small copy stands before the tiles.
        alone_as_tile: whether a picture of one tile is written as a tile without a small copy.
    """

    tile: str
    whole: str
    alone: str
    start: str = ""
    end: str = ""
    between_columns: str = ""
    after_row: str = ""
    between_rows: str = ""
    whole_first: bool = False
    alone_as_tile: bool = False

    def write(self, picture: PictureTokens, image: str, markers: Mapping[str, str]) -> str:
        if picture.grid is None:
            body = self.alone.format(tokens=image * picture.count, **markers)
        else:
            body = self._cut(picture, picture.grid, image, markers)
        return self.start.format(**markers) + body + self.end.format(**markers)

    def _cut(self, picture: PictureTokens, grid: tuple[int, int], image: str, markers: Mapping[str, str]) -> str:
        rows, columns = grid
        has_whole = bool(self.whole) and not (self.alone_as_tile and rows * columns == 1)
        # a picture may be cut without a small copy where the folder's config switches it off
        has_whole &= not picture.sizes or len(picture.sizes) > rows * columns
        counts = picture.counts(rows * columns + has_whole)
        small = counts.pop(0 if self.whole_first else -1) if has_whole else 0
        lines = []
        for row in range(rows):
            tiles = [
                self.tile.format(
                    tokens=image * counts[row * columns + column],
                    row=row + 1,
                    column=column + 1,
                    number=row * columns + column + 1,
                    **markers,
                )
                for column in range(columns)
            ]
            line = self.between_columns.format(**markers).join(tiles) + self.after_row.format(**markers)
            lines.append(line)
        tiled = self.between_rows.format(**markers).join(lines)
        if not has_whole:
            return tiled
        copy = self.whole.format(tokens=image * small, **markers)
        return copy + tiled if self.whole_first else tiled + copy


@dataclass(frozen=True)
class PictureLayout:
    """One row of `LAYOUTS`.

    Attributes:
        layout: of the text.
        markers: by the name that `layout` uses: the key under which a folder's configs name the marker, and its text where
            they do not ("" has none: a folder that does not name it is refused).
        written: what the chat template writes for a picture, in the same form; `None`: the image token.
        image: the image token, in the same form, where it is not what the configs call `image_token`.
        merged: name of a marker that stands once between two pictures side by side, and before a space in front of a word; ""
            for none.
        before_text: whether the pictures and `bos_token` stand before everything else, and a line break behind it.
    """

    layout: Flat | Rows | Tiles = Flat()
    markers: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    written: tuple[str, str] | None = None
    image: tuple[str, str] | None = None
    merged: str = ""
    before_text: bool = False


def token_grid(size: tuple[int, int], count: int) -> tuple[int, int] | None:
    """Rows and columns of square image tokens.

    Args:
        size: height and width of the picture that the vision encoder saw, pixels.
        count: image tokens.

    Returns:
        `None` if no square has room for that many.
    """
    height, width = size
    edge = math.isqrt(height * width // count) if count else 0
    grid = (height // edge, width // edge) if edge else (0, 0)
    return grid if count and grid[0] * grid[1] == count else None
