"""Who is asked in a test."""

from dataclasses import replace

from dataset.views import EvaluationSet
from evaluation.adaptation import AS_IT_IS
from evaluation.in_training import respondent_of
from evaluation.inference import Inference
from evaluation.protocols import ProtocolConfig, adaptation_of
from evaluation.respondent import Respondent
from tests.support.runs import Trainer


def inference(
    trainer: Trainer,
    questions: EvaluationSet,
    batch_size: int = 8,
    protocol: ProtocolConfig = AS_IT_IS,
    **changes,
) -> Inference:
    """A trainer's model before an evaluation set; `changes` of the `Respondent`."""
    respondent: Respondent = replace(respondent_of(trainer), **changes)
    return Inference(respondent, questions, adaptation_of(protocol, respondent, 0, batch_size))
