"""Fetch and verify a published checkpoint: python -m tools.published arc_v1|arc_v2 [--output-dir checkpoints/published]

The ARC Prize verification runs of the original TRM (huggingface.co/arcprize/trm_arc_prize_verification), at a pinned revision.
Writes the weights and all_config.yaml to OUTPUT/<name>/ and prints path, size and SHA-256 of each. The weights must have the size
and SHA-256 below, else nothing is kept; of the configuration only the revision is pinned. What is already there is
verified and not fetched again, so that files brought by hand are checked the same way. HF_ENDPOINT names a mirror.
"""

import hashlib
import os
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.error import URLError

from utils.arguments import parser_of
from utils.errors import UserError, reports_user_errors
from utils.files import sha256_of, write_atomically

REPOSITORY = "arcprize/trm_arc_prize_verification"
REVISION = "55ced5dd59de74c52f53d47aa2898232b5a15b7a"
CONFIG = "all_config.yaml"
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Published:
    """The weights of a checkpoint: folder and name in the repository, bytes, SHA-256, and our choice of data for what starts from it."""

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
    """Where a file of the pinned revision is."""
    return f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co').rstrip('/')}/{REPOSITORY}/resolve/{REVISION}/{published.folder}/{name}"


def fetch(published: Published, folder: Path) -> list[Path]:
    """The checkpoint's files in `folder`, fetched where they are missing. Raises `UserError`, keeping nothing wrong."""
    weights, config = folder / published.weights, folder / CONFIG
    if weights.is_file():
        check(weights, published, weights.stat().st_size, sha256_of(weights), "delete it to fetch it again")
    else:
        download(url_of(published, weights.name), weights, published)
    if not config.is_file():
        download(url_of(published, config.name), config)
    return [weights, config]


def download(url: str, path: Path, expected: Published | None = None) -> None:
    """Fetch one file; what is not `expected` never gets its name."""

    def write(temporary: Path) -> None:
        try:
            with urllib.request.urlopen(url, timeout=60) as source, temporary.open("wb") as target:
                size, digest = copy(source, target)
        except (URLError, TimeoutError, ConnectionError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise UserError(
                f"cannot fetch {url}: {reason}; without a network, bring the file to {path} and run this again to verify it"
            ) from None
        if expected:
            check(path, expected, size, digest, "nothing was kept")

    write_atomically(path, write)


def copy(source: BinaryIO, target: BinaryIO) -> tuple[int, str]:
    """Copy to the end; bytes and SHA-256."""
    digest, size = hashlib.sha256(), 0
    while block := source.read(_BLOCK):
        digest.update(block)
        size += target.write(block)
    return size, digest.hexdigest()


def check(path: Path, expected: Published, size: int, sha256: str, then: str) -> None:
    """Raise `UserError` unless size and checksum are the published ones."""
    if (size, sha256) != (expected.size, expected.sha256):
        raise UserError(
            f"{path} is not the published {expected.folder}/{expected.weights}: {size:,} bytes with SHA-256 {sha256}, "
            f"expected {expected.size:,} bytes with {expected.sha256}; {then}"
        )


def start_from(weights: Path, data: str) -> str:
    """The command that trains an ETRM from these weights, under the cycles and positions that they were trained with."""
    settings = "data.canvas=full arch.pos_encodings=rope arch.L_cycles=4"
    return f"python pretrain_etrm.py data={data} {settings} load_pretrained_decoder={weights}"


@reports_user_errors
def main() -> None:
    parser = parser_of("tools.published", __doc__)
    parser.add_argument("name", choices=CHECKPOINTS)
    parser.add_argument("--output-dir", type=Path, default=Path("checkpoints/published"))
    options = parser.parse_args()
    files = fetch(CHECKPOINTS[options.name], options.output_dir / options.name)
    for path in files:
        print(f"{path}: {path.stat().st_size:,} bytes, SHA-256 {sha256_of(path)}")
    print(f"to start an ETRM from it: {start_from(files[0], CHECKPOINTS[options.name].data)}")
    print("to evaluate it as it is: docs/architecture.md, Starting from a trained decoder")


if __name__ == "__main__":
    main()
