#!/usr/bin/env bash
# Fill a folder with the wheels that a run needs, for a machine without a network:
#
#     tools/offline_wheels.sh DIR [--python 3.12] [--machine x86_64] [--without PACKAGE ...] [--with PACKAGE ...] [--dry-run]
#
# --python, --machine: of the machine that installs; default: those of this one. --without torch: it is there already.
# --with: what is left out unless it is asked for, wandb, matplotlib (draws curves.png) and pillow (draws all other pictures).
# --dry-run: only print what pip would be asked for. There, in the project's folder:
#
#     pip install --no-index --find-links DIR -r DIR/requirements.txt
#
# Versions are those of requirements.txt. This needs a network and pip; PYTHON chooses another interpreter.
set -euo pipefail
PYTHON=${PYTHON:-python3}
root=$(cd "$(dirname "$0")/.." && pwd)

usage() {
  echo "error: $1; usage: tools/offline_wheels.sh DIR [--python 3.12] [--machine x86_64] [--without PACKAGE ...] [--with PACKAGE ...] [--dry-run]" >&2
  exit 2
}

folder="" python=$($PYTHON -c 'import sys; print("%d.%d" % sys.version_info[:2])') machine=$(uname -m) dry="" into=""
without=() with=()
while [ $# -gt 0 ]; do
  case $1 in
    --python | --machine) [ $# -gt 1 ] || usage "$1 needs a value"; declare "${1#--}=$2"; into=""; shift ;;
    --without | --with) into=${1#--} ;;
    --dry-run) dry=yes into="" ;;
    -*) usage "unknown option $1" ;;
    *) case $into in
      without) without+=("$1") ;;
      with) with+=("$1") ;;
      *) [ -z "$folder" ] || usage "one folder at a time, found $folder and $1"; folder=$1 ;;
    esac ;;
  esac
  shift
done
[ -n "$folder" ] || usage "DIR is missing"
[[ $python =~ ^3\.[0-9]+$ ]] || usage "--python takes a version such as 3.12, found $python"

# The pinned versions of what pyproject.toml needs, one a line. Their markers are those of the other machine.
wanted=$($PYTHON - "$root" "$python" "${without[*]:-}" "${with[*]:-}" <<'EOF'
import re, sys
from pathlib import Path
from pip._vendor.packaging.requirements import Requirement

root, python, without, extra = Path(sys.argv[1]), sys.argv[2], sys.argv[3].split(), sys.argv[4].split()
plain = lambda name: re.sub("[-_.]+", "-", name).lower()
listed = re.search(r"^dependencies = \[(.*?)^\]", (root / "pyproject.toml").read_text(), re.M | re.S)[1]
needed = {plain(Requirement(text).name) for text in re.findall(r'"(.+?)"', listed)}
lines = [line.split("#")[0].strip() for line in (root / "requirements.txt").read_text().splitlines()]
pinned = [Requirement(line) for line in lines if line]
pinned = [one for one in pinned if one.marker is None or one.marker.evaluate({"python_version": python})]
known = {plain(one.name) for one in pinned}
if unknown := {plain(name) for name in without + extra} - known:
    sys.exit(f"error: requirements.txt does not name {', '.join(sorted(unknown))}")
chosen = needed - {"matplotlib", "pillow"} - {plain(name) for name in without} | {plain(name) for name in extra}
print("\n".join(f"{one.name}{one.specifier}" for one in pinned if plain(one.name) in chosen))
EOF
)
# omegaconf's parser comes as source only, and is the same for every machine.
source_only="antlr4-python3-runtime==4.9.*"
platforms=()
for tag in manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014; do platforms+=(--platform "${tag}_$machine"); done
build=(wheel --no-deps --wheel-dir "$folder" "$source_only")
download=(download --only-binary :all: --python-version "$python" --implementation cp "${platforms[@]}"
  --find-links "$folder" --dest "$folder" --requirement "$folder/requirements.txt")
if [ -n "$dry" ]; then
  printf '%s\n' "$wanted" "pip ${build[*]}" "pip ${download[*]}"
  exit
fi
mkdir -p "$folder"
printf '%s\n' "$wanted" > "$folder/requirements.txt"
$PYTHON -m pip --disable-pip-version-check --quiet "${build[@]}"
$PYTHON -m pip --disable-pip-version-check --quiet "${download[@]}"
echo "$folder: $(ls "$folder"/*.whl | wc -l) wheels for Python $python on $machine, $(du -cm "$folder"/*.whl | tail -1 | cut -f1) MB"
echo "there, in the project's folder: pip install --no-index --find-links $folder -r $folder/requirements.txt"
