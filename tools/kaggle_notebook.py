"""Write a notebook that answers the ARC Prize on Kaggle, where there is no network.

    python -m tools.kaggle_notebook submission.ipynb num_views=64 protocol=test_time_training

--input names the folder of an uploaded dataset with three folders: `project` (this one), `wheels`
(tools/offline_wheels.sh) and `checkpoint` (tools/publish.py, in either layout). The notebook builds a dataset
of the challenges, evaluates the checkpoint on it and leaves submission.json. Any key of evaluate.py applies.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # called by its path: import from the project's folder, not from this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from config import compose
from evaluation.session import EvaluateConfig
from utils.arguments import parser_of
from utils.errors import UserError, reports_user_errors
from utils.files import write_atomically

FIXED = ["controls=[]", "report=false"]  # nothing is known of the answers
DECIDED = ("checkpoint", "data_path", "output_dir")
ABOUT = """# Answers to ARC tasks

Made by `python -m tools.kaggle_notebook`. It needs no network: all it reads is in `INPUT` and `CHALLENGES`.
"""
PATHS = """from pathlib import Path

INPUT = Path({input!r})  # project, wheels, checkpoint
CHALLENGES = Path({challenges!r})
WORK = Path({work!r})
SETTINGS = {settings!r}  # of evaluate.py"""
RUN = """import os
import subprocess
import sys


def python(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(INPUT / "project"), "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run([sys.executable, *map(str, arguments)], cwd=INPUT / "project", env=environment, check=True)


wheels = INPUT / "wheels"
python("-m", "pip", "install", "--no-index", "--find-links", wheels, "-r", wheels / "requirements.txt")"""
BUILD = """prefix, subset = CHALLENGES.name.removesuffix("_challenges.json").rsplit("_", 1)
tasks = ["--input-file-prefix", CHALLENGES.with_name(prefix), "--subsets", subset, "--test-set-name", subset]
python("-m", "dataset.build_arc_dataset", *tasks, "--output-dir", WORK / "data")"""
ANSWER = """model = INPUT / "checkpoint"
layout = "hub:" if (model / "config.json").is_file() else ""
asked = [f"checkpoint={layout}{model}", f"data_path={WORK / 'data'}"]
python("evaluate.py", *asked, f"output_dir={WORK / 'answers'}", *SETTINGS)"""
SUBMIT = """import json
import shutil

submission = WORK / "submission.json"
shutil.copy(WORK / "answers" / submission.name, submission)
asked = {name: len(task["test"]) for name, task in json.loads(CHALLENGES.read_text()).items()}
answered = {name: len(answers) for name, answers in json.loads(submission.read_text()).items()}
assert answered == asked, "an answer is missing"
print(f"{submission}: {len(answered)} tasks, {sum(answered.values())} queries")"""


def notebook(input_folder: str, challenges: str, work: str, overrides: list[str]) -> dict[str, Any]:
    """The notebook as JSON (nbformat 4). Raises `UserError` for keys that evaluate.py does not take."""
    for override in overrides:
        key = override.partition("=")[0]
        if key in DECIDED:
            raise UserError(f"{key} is the notebook's own: leave it out")
    settings = [*FIXED, *overrides]
    compose.load(EvaluateConfig, "evaluate", ["checkpoint=x", *settings])
    paths = PATHS.format(input=input_folder, challenges=challenges, work=work, settings=settings)
    cells = [_cell("markdown", ABOUT)]
    cells += [_cell("code", source) for source in (paths, RUN, BUILD, ANSWER, SUBMIT)]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 4}


def _cell(kind: str, source: str) -> dict[str, Any]:
    made = {"cell_type": kind, "metadata": {}, "source": source.splitlines(keepends=True)}
    return made | ({"execution_count": None, "outputs": []} if kind == "code" else {})


@reports_user_errors
def main() -> None:
    parser = parser_of("tools.kaggle_notebook", __doc__)
    add = parser.add_argument
    challenges = "/kaggle/input/arc-prize-2025/arc-agi_test_challenges.json"
    add("output", type=Path, help="the notebook to write")
    add("overrides", nargs="*", metavar="key=value", help="of evaluate.py")
    add("--input", default="/kaggle/input/etrm", help="project, wheels, checkpoint; default: %(default)s")
    add("--challenges", default=challenges, help="what is asked; default: %(default)s")
    add("--work", default="/kaggle/working", help="where the submission goes; default: %(default)s")
    options = parser.parse_intermixed_args()
    made = notebook(options.input, options.challenges, options.work, options.overrides)
    text = json.dumps(made, indent=1) + "\n"
    write_atomically(options.output, partial(Path.write_text, data=text, encoding="utf-8"))
    print(f"{options.output}: {len(made['cells'])} cells")


if __name__ == "__main__":
    main()
