from .answers_file import AnswersFile as AnswersFile
from .endpoint import Endpoint as Endpoint
from .local_model import LocalModel as LocalModel
