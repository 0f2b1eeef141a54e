"""How the grids of a game look, in a terminal, in pictures and on pages."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Drawing:
    """How cells look.

    colours: of each cell value, as `#rrggbb`. names: of the values, for a legend.
    characters: of each value where there are no colours. gap: what stands between them.
    written: the character inside a coloured cell of each value, a space for none.
    given: the colour of a cell that the question already fills; None: as any other.
    box: rows and columns between thick lines; None: no such lines.
    cell: pixels of a cell in small pictures.
    """

    colours: Sequence[str]
    names: Sequence[str]
    characters: str
    gap: str = " "
    written: str = ""
    given: str | None = None
    box: tuple[int, int] | None = None
    cell: int = 8

    def to_json(self) -> dict[str, Any]:
        """What a page needs."""
        return {
            "colours": list(self.colours),
            "names": list(self.names),
            "written": self.written,
            "given": self.given,
            "box": self.box,
        }

    @property
    def rgb(self) -> list[tuple[int, int, int]]:
        """The colours as numbers, red, green and blue."""
        return [rgb(colour) for colour in self.colours]


def rgb(colour: str) -> tuple[int, int, int]:
    """`#rrggbb` as numbers."""
    red, green, blue = bytes.fromhex(colour.removeprefix("#"))
    return red, green, blue


def ink(paper: str) -> tuple[int, int, int]:
    """The colour of letters on a cell of the colour `paper`."""
    red, green, blue = rgb(paper)
    return (29, 29, 27) if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else (255, 255, 255)
