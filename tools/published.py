"""Fetch and verify a published checkpoint.

    python -m tools.published arc_v1 --output-dir checkpoints/published
    python -m tools.published hub:owner/name@revision

A model that this framework has published is named as in checkpoint=hub:owner/name@revision, and kept in a
cache. The others are the ARC Prize verification runs of the original TRM at a pinned revision
(huggingface.co/arcprize/trm_arc_prize_verification). The command writes the weights and all_config.yaml to
the folder NAME in the output folder, and prints the path, size and SHA-256 of each. Weights without the
published size and SHA-256 are not kept; the configuration is pinned by the revision alone. A file that is
already there is verified and not fetched again, so that files brought by hand are checked the same way. The
environment variable HF_ENDPOINT names a mirror.
"""

import hashlib
import os
import sys
import urllib.request
from argparse import ArgumentTypeError
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.error import URLError

if not __package__:  # called by its path: import from the project's folder, not from this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from utils import checkpoint, hub
from utils.arguments import parser_of
from utils.errors import UserError, reports_user_errors
from utils.files import sha256_of, write_atomically

REPOSITORY = "arcprize/trm_arc_prize_verification"
REVISION = "55ced5dd59de74c52f53d47aa2898232b5a15b7a"
CONFIG = "all_config.yaml"
_BLOCK = 1 << 20  # bytes that are read at once
TIMEOUT = 60  # seconds without an answer


@dataclass(frozen=True)
class Published:
    """A checkpoint's weights.

    folder, weights: where they are in the repository. size: bytes. data: the data configuration for a run
    that starts from them.
    """

    folder: str
    weights: str
    size: int
    sha256: str
    data: str


CHECKPOINTS = {
    "arc_v1": Published(
        "arc_v1_public",
        "step_518071",
        1_822_205_258,
        "53689643ad1606d7c22c758f8af0a71b3b66275dea074f214d2f1048d9a01fb0",
        "arc1",
    ),
    "arc_v2": Published(
        "arc_v2_public",
        "step_723914",
        2_467_988_810,
        "8d7036b97e7ea38c7dd29d01216bfcfc4e212af3024d5233fe40dd3059e8f4a9",
        "arc2",
    ),
}


def url_of(published: Published, name: str) -> str:
    """The address of a file of the pinned revision."""
    host = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    return f"{host}/{REPOSITORY}/resolve/{REVISION}/{published.folder}/{name}"


def fetch(published: Published, folder: Path) -> list[Path]:
    """The checkpoint's files in `folder`, fetched where missing. Raises `UserError` for a wrong file."""
    weights, config = folder / published.weights, folder / CONFIG
    if weights.is_file():
        check(weights, published, weights.stat().st_size, sha256_of(weights), "delete it to fetch it again")
    else:
        download(url_of(published, weights.name), weights, published)
    # The configuration has no checksum to verify what is there.
    if not config.is_file():
        download(url_of(published, config.name), config)
    return [weights, config]


def download(url: str, path: Path, expected: Published | None = None) -> None:
    """Fetch one file to `path`. Raises `UserError` if that fails, or if it is not what is `expected`."""

    def write(temporary: Path) -> None:
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT) as source, temporary.open("wb") as target:
                size, digest = copy(source, target)
        except (URLError, TimeoutError, ConnectionError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise UserError(
                f"cannot fetch {url}: {reason}; without a network, bring the file to {path} "
                "and run this again to verify it"
            ) from None
        # Checked under its temporary name: a wrong file never gets the right one.
        if expected:
            check(path, expected, size, digest, "nothing was kept")

    write_atomically(path, write)


def copy(source: BinaryIO, target: BinaryIO) -> tuple[int, str]:
    """Copy to the end, and return the number of bytes and their SHA-256."""
    digest, size = hashlib.sha256(), 0
    while block := source.read(_BLOCK):
        digest.update(block)
        size += target.write(block)
    return size, digest.hexdigest()


def check(path: Path, expected: Published, size: int, sha256: str, then: str) -> None:
    """Raise `UserError` with the advice `then` unless size and checksum are the published ones."""
    if (size, sha256) != (expected.size, expected.sha256):
        raise UserError(
            f"{path} is not the published {expected.folder}/{expected.weights}: "
            f"{size:,} bytes with SHA-256 {sha256}, "
            f"expected {expected.size:,} bytes with {expected.sha256}; {then}"
        )


def known(text: str) -> str:
    """A name on the hub, or one of `CHECKPOINTS`."""
    if not hub.is_reference(text) and text not in CHECKPOINTS:
        raise ArgumentTypeError(
            f"{text} is none of {', '.join(CHECKPOINTS)}, nor {hub.PREFIX}owner/name@revision"
        )
    return text


def start_from(weights: Path, data: str) -> str:
    """The command that trains an ETRM from these weights."""
    # The positions and cycles that the weights were trained with; others would be refused.
    settings = "data.canvas=full arch.pos_encodings=rope arch.L_cycles=4"
    return f"python pretrain_etrm.py data={data} {settings} load_pretrained_decoder={weights}"


@reports_user_errors
def main() -> None:
    parser = parser_of("tools.published", __doc__)
    add = parser.add_argument
    add("name", type=known, help=f"{', '.join(CHECKPOINTS)}, or {hub.PREFIX}owner/name@revision")
    add("--output-dir", type=Path, default=Path("checkpoints/published"), help="default: %(default)s")
    options = parser.parse_args()
    if hub.is_reference(options.name):
        folder = checkpoint.resolve(options.name)
        for path in sorted(folder.iterdir()):
            print(f"{path}: {path.stat().st_size:,} bytes, SHA-256 {sha256_of(path)}")
        print(f"to evaluate it: python evaluate.py checkpoint={options.name}")
        return
    files = fetch(CHECKPOINTS[options.name], options.output_dir / options.name)
    for path in files:
        print(f"{path}: {path.stat().st_size:,} bytes, SHA-256 {sha256_of(path)}")
    print(f"to start an ETRM from it: {start_from(files[0], CHECKPOINTS[options.name].data)}")
    print("to evaluate it as it is: docs/architecture.md, Starting from a trained decoder")


if __name__ == "__main__":
    main()
