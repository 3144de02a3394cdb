"""Synthetic tasks that tell sequence models apart: pure functions from a seed to a batch, and the share answered right.

| task | what is asked |
|---|---|
| `copying` | the tokens seen at fixed places, in order |
| `selective_copying` | the tokens seen at random places, in order (arXiv 2312.00752, 4.1.1) |
| `induction_heads` | what followed the special token when it came first (arXiv 2312.00752, 4.1.2) |
| `associative_recall` | the value of each key, many keys a row: MQAR (arXiv 2312.04927) |
| `needle` | a number hidden in a long text, at a given depth |
| `phonebook` | the number of one name of many (arXiv 2406.07887) |
"""

from statespan.evaluation.accuracy import Accuracy, answer_accuracy
from statespan.evaluation.batch import TaskBatch
from statespan.evaluation.copying import copying, selective_copying
from statespan.evaluation.recall import associative_recall, induction_heads
from statespan.evaluation.retrieval import needle, phonebook

__all__ = [
    "Accuracy",
    "TaskBatch",
    "answer_accuracy",
    "associative_recall",
    "copying",
    "induction_heads",
    "needle",
    "phonebook",
    "selective_copying",
]
