"""The three kinds of `mof.answering.Answerer`: a model in this process, an endpoint on the network, a file of answers."""

from mof.answerers.answers_file import AnswersFile
from mof.answerers.endpoint import Endpoint
from mof.answerers.local_model import LocalModel

__all__ = ["AnswersFile", "Endpoint", "LocalModel"]
