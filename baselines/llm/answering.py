"""A language model asked as every other model is: the same views, votes, scores, controls and files."""

import math
import time
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from baselines.llm.prompts import Example, examples_of, grid_of
from baselines.llm.settings import LlmConfig
from baselines.llm.tuning import LanguageModel
from dataset import augment
from dataset.leaks import UNKNOWN_PAIRS, tasks_seen
from dataset.store import Store
from dataset.views import Control, EvaluationSet
from evaluation.adaptation import AS_IT_IS
from evaluation.depth import ORACLE, best_of
from evaluation.inference import copy_input
from evaluation.notes import notes_of
from evaluation.predictions import Predictions
from evaluation.protocols import label
from evaluation.records import answers_of, counts_of, known_output
from evaluation.run import Evaluation
from evaluation.scoreboard import Scoreboard, controls_of


@dataclass
class Asked:
    """What a model has answered, and how many views were asked, shortened, or not asked for their length."""

    predictions: Predictions = field(default_factory=Predictions)
    views: int = 0
    shortened: int = 0
    too_long: int = 0

    def notes(self, max_length: int) -> list[str]:
        """What did not fit."""
        said = {
            "views lost their first demonstrations": self.shortened,
            "views were not asked": self.too_long,
        }
        return [f"{n} {what}: max_length={max_length}" for what, n in said.items() if n]


def questions_of(
    config: LlmConfig, store: Store, split: str, views: int, control: Control = "none"
) -> EvaluationSet:
    """The views of a split's queries. With `train`, every pair of a task in turn."""
    limits = {"test": config.data.max_eval_groups, "train": config.data.max_train_groups}
    return EvaluationSet(store, config.data, split, views, config.seed, control, limits[split])


def evaluate(config: LlmConfig, store: Store, language: LanguageModel) -> Evaluation:
    """Ask, vote and score, with the configured controls.

    The scores are transductive: nobody knows what a published model has read.
    """

    def ask(control: Control = "none") -> tuple[EvaluationSet, Asked]:
        questions = questions_of(config, store, config.split, config.num_views, control)
        questions.rollouts = config.attempts
        return questions, answered(config, questions, language)

    started = time.monotonic()
    questions, asked = ask()
    seconds = time.monotonic() - started
    votes = asked.predictions.vote(config.ranking)
    answers = answers_of(questions, votes)
    seen = tasks_seen(store, questions.tasks, UNKNOWN_PAIRS)
    labelled = any(known_output(questions, query) is not None for query in questions.queries)
    board = Scoreboard(store, questions.tasks, config)
    left_out: dict[str, int] = {}
    if labelled:
        board.add(questions, answers)
        if config.attempts > 1:
            board.add(questions, best_of(questions, answers), ORACLE)
        for control in controls_of(config, store.layout):
            if control == "copy_input":
                board.add(questions, answers_of(questions, copy_input(questions)), control)
                continue
            changed, found = ask(control)
            board.add(changed, answers_of(changed, found.predictions.vote(config.ranking)), control)
            unasked = {query.task for query, so in zip(changed.queries, changed.asked, strict=True) if not so}
            left_out |= {control: len(unasked)} if unasked else {}
    notes = notes_of(questions, config, None, seen, left_out, labelled, asked.views)
    return Evaluation(
        protocol=label(AS_IT_IS, store, seen),
        adaptation=None,
        questions=questions,
        predictions=asked.predictions,
        prediction_seconds=seconds,
        scores=board.scores,
        by_subset=board.by_subset,
        means={},
        depths=[],
        counts=counts_of(questions, answers, asked.views),
        answers=answers,
        record_steps=False,
        notes=[*notes, *asked.notes(config.max_length)],
    )


@torch.no_grad()
def answered(config: LlmConfig, questions: EvaluationSet, language: LanguageModel) -> Asked:
    """The answers to every view that is short enough.

    In the place of a halting logit stands that of the whole answer's probability, among texts of cells.
    """
    asked, jobs = Asked(), list[tuple[Example, list[int]]]()
    for example in examples_of(questions):
        fitted = language.tokens.fitted(example, config.max_length - example.budget)
        if fitted is None:
            asked.too_long += 1
            continue
        asked.shortened += fitted[1] > 0
        jobs.append((example, fitted[0]))
    asked.views = len(jobs)
    # Those of one budget together, and among them those of about one length.
    jobs.sort(key=lambda job: (job[0].budget, len(job[1])))
    torch.manual_seed(config.seed)
    language.model.eval()
    with tqdm(total=len(jobs), unit="view", desc="views", leave=False, disable=None) as bar:
        for _, group in groupby(jobs, lambda job: job[0].budget):
            alike = list(group)
            for start in range(0, len(alike), config.batch_size):
                batch = alike[start : start + config.batch_size]
                for attempt in range(config.attempts):
                    texts = _generated(config, language, batch, attempt)
                    for (example, _), (text, log_probability) in zip(batch, texts, strict=True):
                        _keep(asked.predictions, questions, example, attempt, text, log_probability)
                bar.update(len(batch))
    return asked


def _keep(
    predictions: Predictions,
    questions: EvaluationSet,
    example: Example,
    attempt: int,
    text: str,
    log_probability: float,
) -> None:
    """Add an answer, mapped back."""
    grid = grid_of(text)
    view = questions.view(questions.queries[example.query], example.view)
    original = augment.invert(grid, *view) if grid.size else grid
    predictions.add(example.query, example.view, 0, original, logit(log_probability), rollout=attempt)


def logit(log_probability: float) -> float:
    """That of a probability by its logarithm, finite also next to 1."""
    return log_probability - math.log(max(-math.expm1(log_probability), 2.0**-53))


def _generated(
    config: LlmConfig, language: LanguageModel, batch: list[tuple[Example, list[int]]], attempt: int
) -> list[tuple[str, float]]:
    """Each prompt's answer with the logarithm of its probability. The first attempt is the greedy one."""
    from transformers import GenerationConfig, LogitsProcessorList

    tokens, drawn = language.tokens, attempt > 0
    longest = max(len(prompt) for _, prompt in batch)
    # Filled in front, so that all answers begin at one place.
    rows = [[tokens.end] * (longest - len(prompt)) + prompt for _, prompt in batch]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for _, prompt in batch]
    how = {"temperature": config.temperature, "top_k": 0, "top_p": 1.0} if drawn else {}
    generation = GenerationConfig(
        max_new_tokens=batch[0][0].budget,
        do_sample=drawn,
        eos_token_id=tokens.end,
        pad_token_id=tokens.end,
        **how,
    )
    cells = CellsAlone(tokens.permitted)
    whole = language.model.generate(
        input_ids=torch.tensor(rows, device=language.device),
        attention_mask=torch.tensor(mask, device=language.device),
        generation_config=generation,
        logits_processor=LogitsProcessorList([cells]),
    )
    answers = whole[:, longest:].tolist()
    return list(zip(map(tokens.decode, answers), cells.log_probabilities(answers), strict=True))


class CellsAlone:
    """Lets a model write cells, ends of rows and the end of the text alone, and keeps their probabilities."""

    def __init__(self, permitted: list[int]):
        self.permitted = permitted
        self.steps: list[Tensor] = []  # (B, 12) each

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits (B, V) of the next token, and the same with all others at minus infinity."""
        chosen = scores[:, self.permitted]
        self.steps.append(chosen.float().log_softmax(-1).cpu())
        only = torch.full_like(scores, -math.inf)
        only[:, self.permitted] = chosen
        return only

    def log_probabilities(self, answers: list[list[int]]) -> list[float]:
        """The logarithm of the probability of each answer up to its end."""
        place = {token: i for i, token in enumerate(self.permitted)}
        end, steps = self.permitted[-1], torch.stack(self.steps, 1).double().numpy()  # (B, S, 12)
        lengths = [row.index(end) + 1 if end in row else len(row) for row in answers]
        return [
            float(np.sum([steps[row, i, place[token]] for i, token in enumerate(answer[:length])]))
            for row, (answer, length) in enumerate(zip(answers, lengths, strict=True))
        ]
