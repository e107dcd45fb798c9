"""The three kinds of `mof.evals.answering.Answerer`: a model in this process, an endpoint on the network, a file of answers."""

from mof.evals.answerers.answers_file import AnswersFile
from mof.evals.answerers.endpoint import Endpoint
from mof.evals.answerers.local_model import LocalModel

__all__ = ["AnswersFile", "Endpoint", "LocalModel"]
