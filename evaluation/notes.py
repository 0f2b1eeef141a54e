"""What a reader of an evaluation's scores should know, in words."""

from collections.abc import Iterator, Mapping

from dataset.leaks import Seen
from dataset.views import EvaluationSet
from evaluation.records import SUBMISSION_ATTEMPTS
from evaluation.voting import VotingConfig


def notes_of(
    questions: EvaluationSet,
    config: VotingConfig,
    adaptation: str | None,
    seen: Seen,
    left_out: Mapping[str, int],
    labelled: bool,
    views: int,
) -> list[str]:
    """The notes of an evaluation, most surprising first.

    adaptation: the name of the protocol, if it adapts the model.
    left_out: control -> tasks that it could not ask.
    labelled: whether any answer is known.
    views: how many were asked.
    """
    notes = [
        f"{control}: {count} of {len(questions.tasks)} tasks left out, "
        "no other's demonstrations fit on their canvas"
        for control, count in left_out.items()
    ]
    if not labelled:
        notes.append(
            "no answer to these tasks is known: nothing was scored; "
            "the submission holds what the model answers"
        )
    if seen:
        notes.append(seen.why)
    if adaptation and (too_few := _too_few_to_adapt(questions)):
        notes.append(
            f"{too_few} queries have too few demonstrations for {adaptation} and were answered without"
        )
    notes += _about_questions(questions, config)
    if config.vote_stop:
        notes.append(_about_stopped_votes(questions, max(config.pass_ks), views))
    return notes


def _too_few_to_adapt(questions: EvaluationSet) -> int:
    """The queries that were asked without the adaptation."""
    asked = (query for query in questions.queries if query not in questions.too_large)
    return sum(not questions.can_adapt(query) for query in asked)


def _about_questions(questions: EvaluationSet, config: VotingConfig) -> Iterator[str]:
    """What could not be asked as configured."""
    data = questions.config
    attempts = questions.rollouts
    if questions.store.layout.shares_rule:
        how = f"in {attempts} attempts" if attempts > 1 else "once, without votes"
        yield (f"every puzzle is asked {how}; it has no demonstrations, so only copy_input can be a control")
    elif questions.num_views < config.num_views:
        yield f"one view instead of {config.num_views}: the model was trained without turned grids"
    if attempts > 1:
        yield (
            f"{attempts} attempts at each view; "
            "oracle scores the best of them by the known answer, an upper bound of every selection"
        )
    if questions.truncated:
        yield (
            f"{len(questions.truncated)} tasks have more than data.max_demos={data.max_demos} "
            "demonstrations; the first ones were used"
        )
    if questions.too_large:
        yield (
            f"{len(questions.too_large)} queries are larger than the largest canvas ({data.sides[-1]}) "
            "and count as wrong"
        )


def _about_stopped_votes(questions: EvaluationSet, k: int, views: int) -> str:
    """How much of the work was saved by stopping once the first k answers were certain, and what it costs."""
    asked = (query for query in questions.queries if query not in questions.too_large)
    in_full = sum(map(questions.num_views_of, asked))
    note = f"{views} of {in_full} views were asked: "
    note += f"a query's votes stopped once its first {k} answers were certain"
    if k < SUBMISSION_ATTEMPTS:
        note += ", the second attempt in the submission may differ from the full vote's"
    return note
