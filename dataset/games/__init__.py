"""The games: what a dataset's grids are, a file for each.

Every module in this folder with a `GAME` is one. A game from elsewhere is added with `register`.
"""

import importlib
import pkgutil

from dataset.games.game import Game

GAMES: dict[str, Game] = {}


def register(game: Game) -> Game:
    """Add a game under its name. Raises `ValueError` where another one has the name."""
    if GAMES.setdefault(game.name, game) is not game:
        raise ValueError(f"there is a game '{game.name}' already")
    return game


for _module in sorted(module.name for module in pkgutil.iter_modules(__path__)):
    if _game := getattr(importlib.import_module(f"{__name__}.{_module}"), "GAME", None):
        register(_game)
