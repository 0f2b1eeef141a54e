"""Pool the votes of several evaluations of the same tasks, and score the pooled answers.

    python -m tools.pool runs/a/evaluations/NAME runs/b/evaluations/NAME --k 1 2 --output-dir pooled

The folders are those of evaluate.py. Every evaluation has one vote per query, split over its answers by
their share of its views. It prints ARC/pass@k and tasks_solved@k of the pool and of each evaluation, with
95 % Wilson intervals over tasks. --output-dir writes results.json, per_example.jsonl and submission.json.
"""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

if not __package__:  # called by its path: import from the project's folder, not from this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from evaluation.evaluated import (
    Evaluated,
    Record,
    check_known,
    explains_foreign_files,
    in_words,
    ranks_of,
    read_with_records,
)
from evaluation.folder import RECORDS, RESULTS, SUBMISSION, write_records
from evaluation.metrics import in_percent
from evaluation.records import REPORTED_CANDIDATES, STATUSES, attempts, grid_hash
from evaluation.voting import Ballot, PooledAnswer, key_of, pooled
from utils.arguments import parser_of, positive
from utils.environment import git_commit
from utils.errors import UserError, reports_user_errors
from utils.files import check_replaceable, directory_written_whole, write_json

Place = tuple[str, int]  # a query's task, and its number there


class Asked(NamedTuple):
    """What an evaluation says of a query: hashes of the grids, None for what is unknown, and its votes."""

    input_hash: str
    label_hash: str | None
    status: str
    first_answer: str | None
    ballot: Ballot

    @classmethod
    def of(cls, record: Record) -> "Asked":
        """The content of a line of per_example.jsonl."""
        answers = [
            (key_of(np.array(one["grid"], np.uint8)), one["votes"], one["q"]) for one in record["candidates"]
        ]
        names = ("input_hash", "label_hash", "status", "top1_pred_hash")
        return cls(*(record[name] for name in names), Ballot(answers, record["num_votes"]))


@dataclass
class Voter:
    """One of the evaluations that are pooled."""

    evaluated: Evaluated
    queries: dict[Place, Asked]

    @property
    def folder(self) -> Path:
        """Where it is."""
        return self.evaluated.folder


@dataclass
class Pool:
    """What becomes of several evaluations, as the contents of the files of one."""

    results: dict[str, Any]
    records: list[Record]
    submission: dict[str, list[dict]]


def read(folder: Path) -> Voter:
    """The evaluation in a folder. Raises `UserError` if there is none, or only a pool."""
    evaluated, records = read_with_records(folder)
    if evaluated.about.get("pooled"):
        raise UserError(f"{folder} is a pool; give the evaluations that it was made of")
    with explains_foreign_files(folder):
        return Voter(evaluated, {(record["task"], record["query"]): Asked.of(record) for record in records})


def check_same_questions(voters: Sequence[Voter]) -> None:
    """Raise `UserError` unless all evaluations were asked the same queries of the same split."""
    first = voters[0]
    for other in voters[1:]:
        splits = [voter.evaluated.about.get("split") for voter in (first, other)]
        if splits[0] != splits[1]:
            raise UserError(f"{first.folder} asks split {splits[0]}, {other.folder} asks split {splits[1]}")
        if unshared := first.queries.keys() ^ other.queries.keys():
            task, number = min(unshared)
            raise UserError(
                f"{first.folder} and {other.folder} ask different queries: {len(unshared)} are in "
                f"one of them only, such as query {number} of task {task}"
            )
        for (task, number), asked in first.queries.items():
            for part in ("input_hash", "label_hash"):
                if getattr(asked, part) != getattr(other.queries[task, number], part):
                    raise UserError(
                        f"query {number} of task {task} has another {part} in {other.folder} "
                        f"than in {first.folder}: these are different tasks"
                    )


def label_of(evaluations: Sequence[Evaluated]) -> str:
    """The protocol of a pool names those of all evaluations; with a transductive one it is transductive."""
    names = list(dict.fromkeys(evaluated.protocol for evaluated in evaluations))
    joined = " + ".join(names)
    transductive = any(evaluated.about["protocol"] == "transductive" for evaluated in evaluations)
    return f"transductive ({joined})" if transductive and len(names) > 1 else joined


def pool(voters: Sequence[Voter], ks: Sequence[int]) -> Pool:
    """Pool evaluations.

    Raises `UserError` for evaluations of different queries, and for a k beyond the answers that are known.
    """
    evaluations = [voter.evaluated for voter in voters]
    if max(ks) > REPORTED_CANDIDATES:
        raise UserError(
            f"--k {max(ks)}: {RECORDS} holds the first {REPORTED_CANDIDATES} answers of a query only"
        )
    check_known(evaluations, ks)
    check_same_questions(voters)
    label, records, submission = label_of(evaluations), list[Record](), dict[str, list[dict]]()
    for place in voters[0].queries:
        asked = [voter.queries[place] for voter in voters]
        answers = pooled(one.ballot for one in asked)
        records.append(_record(place, asked, answers, label))
        submission.setdefault(place[0], []).append(attempts(answers))
    descriptions = [evaluated.description for evaluated in evaluations]
    about = {
        "protocol": label,
        "split": evaluations[0].about.get("split"),
        "num_views": sum(one["num_views"] for one in descriptions),
        "ranking": "pooled",
        "checkpoint": [one["checkpoint"] for one in descriptions],
    }
    statuses = [record["status"] for record in records]
    scores = Evaluated(Path(), about, ranks_of(records)).scores(ks)
    results = {
        **about,
        "git_commit": git_commit(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "counts": {
            "tasks": len(submission),
            "queries": len(records),
            **{name: statuses.count(name) for name in STATUSES},
        },
        "same_first_answer": _same_first_answer(voters),
        "notes": notes_of(voters),
        "scores": [one.to_json() for one in scores],
        "pooled": [
            {**one, "scores": [score.to_json() for score in evaluated.scores(ks)]}
            for one, evaluated in zip(descriptions, evaluations, strict=True)
        ],
    }
    return Pool(results, records, submission)


def _record(place: Place, asked: list[Asked], answers: list[PooledAnswer], label: str) -> Record:
    """A line of the pool's per_example.jsonl. A vote is that of an evaluation."""
    hashes = [grid_hash(one.grid) for one in answers]
    first, truth = asked[0], asked[0].label_hash
    rank = hashes.index(truth) + 1 if truth in hashes else None
    return {
        "task": place[0],
        "puzzle_name": place[0],
        "query": place[1],
        "protocol": label,
        "status": _status(asked, answers),
        "num_votes": sum(bool(one.ballot.num_votes) for one in asked),
        "input_hash": first.input_hash,
        "label_hash": truth,
        "top1_pred_hash": hashes[0] if hashes else None,
        "top1_correct": None if truth is None else rank == 1,
        "rank_of_truth": rank,
        "candidates": [
            {
                "grid": one.grid.tolist(),
                "votes": round(float(one.share), 6),
                "q": round(float(one.q / one.share), 6),
                "correct": None if truth is None else grid == truth,
            }
            for one, grid in zip(answers[:REPORTED_CANDIDATES], hashes, strict=False)
        ],
    }


def _status(asked: list[Asked], answers: list[PooledAnswer]) -> str:
    """What became of a query, one of `STATUSES`; an answer has room if one evaluation's canvas has it."""
    if asked[0].label_hash is None:
        return "unlabelled"
    if not answers:
        return "no_prediction"
    too_large = all(one.status != "scored" for one in asked)
    return "answer_exceeds_canvas" if too_large else "scored"


def _same_first_answer(voters: Sequence[Voter]) -> float:
    """The share of queries to which all evaluations give the same first answer."""
    firsts = [{voter.queries[place].first_answer for voter in voters} for place in voters[0].queries]
    return sum(len(one) == 1 and None not in one for one in firsts) / max(len(firsts), 1)


def notes_of(voters: Sequence[Voter]) -> list[str]:
    """What a reader of the pool's scores should know, in words."""
    notes = []
    if len({voter.evaluated.protocol for voter in voters}) > 1:
        named = ", ".join(f"{voter.folder} is {voter.evaluated.protocol}" for voter in voters)
        notes.append(f"the protocols differ: {named}")
    if not any(voter.evaluated.ranks for voter in voters):
        notes.append("no answer to these tasks is known: nothing was scored")
    for voter in voters:
        about = voter.evaluated.about
        if about.get("ranking") != "votes":
            notes.append(f"{voter.folder} is ranked by {about.get('ranking')}; the pool counts its votes")
        if about.get("vote_stop"):
            notes.append(f"{voter.folder} stopped its votes; its shares are those of the views it asked")
    unknown = [[voter.queries[place].ballot.unknown for voter in voters] for place in voters[0].queries]
    if cut := sum(any(shares) for shares in unknown):
        votes = sum(bool(asked.ballot.num_votes) for voter in voters for asked in voter.queries.values())
        notes.append(
            f"{RECORDS} keeps the first {REPORTED_CANDIDATES} answers of an evaluation; "
            f"{100 * float(sum(map(sum, unknown))) / votes:.1f} % of the votes, in {cut} of {len(unknown)} "
            "queries, went to others and count for no answer"
        )
    return notes


def table(results: dict[str, Any]) -> str:
    """A pool's results as text."""
    counts, rows = results["counts"], results["pooled"]
    headings = "".join(f"{score['metric']:<26}" for score in results["scores"])
    lines = [
        f"protocol {results['protocol']}, split {results['split']}: "
        f"{counts['tasks']} tasks, {counts['queries']} queries "
        f"({counts['no_prediction']} without a prediction, "
        f"{counts['answer_exceeds_canvas']} whose answer is larger than their canvas, "
        f"{counts['unlabelled']} unlabelled), 95 % intervals",
        f"the first answers agree in {100 * results['same_first_answer']:.1f} % of the queries",
        "",
        f"{'':<6}{headings}evaluation",
        *(f"{i:<6}{_cells(one['scores'])}{in_words(one)}" for i, one in enumerate(rows, 1)),
        f"{'pool':<6}{_cells(results['scores'])}".rstrip(),
    ]
    return "\n".join([*lines, *(["", *results["notes"]] if results["notes"] else [])])


def _cells(scores: list[dict[str, Any]]) -> str:
    """A row's scores; those of no task are a dash."""
    texts = (in_percent(s["value"], s["ci_low"], s["ci_high"]) if s["n"] else "    -" for s in scores)
    return "".join(f"{text:<26}" for text in texts)


def write(folder: Path, made: Pool) -> None:
    """Write the files of a pool, or none of them. An earlier evaluation there is replaced."""
    with directory_written_whole(folder, marker=RESULTS) as temporary:
        write_json(temporary / RESULTS, made.results, indent=1)
        write_json(temporary / SUBMISSION, made.submission)
        write_records(temporary / RECORDS, made.records)


@reports_user_errors
def main() -> None:
    parser = parser_of("tools.pool", __doc__)
    add = parser.add_argument
    add("folders", metavar="evaluation", type=Path, nargs="+", help="the folders of two evaluations or more")
    add("--k", type=positive, nargs="+", default=[1, 2], help="answers per query (default: 1 2)")
    add("--output-dir", type=Path, help="write the pool's files into this folder")
    options = parser.parse_args()
    places = [folder.resolve() for folder in options.folders]
    # An evaluation that is given twice would have two votes.
    if len(set(places)) < max(2, len(places)):
        raise UserError("give two different evaluations or more")
    if options.output_dir:
        check_replaceable(options.output_dir, RESULTS)
        if options.output_dir.resolve() in places:
            raise UserError(f"{options.output_dir} is one of the evaluations, and would be replaced")
    made = pool([read(folder) for folder in options.folders], list(dict.fromkeys(options.k)))
    if options.output_dir:
        write(options.output_dir, made)
    print(table(made.results))
    if options.output_dir:
        print(f"{options.output_dir}: {RESULTS}, {RECORDS}, {SUBMISSION}")


if __name__ == "__main__":
    main()
