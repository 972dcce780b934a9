"""Score: what every head is worth, by one method a file. Results are `HeadScores`.

`retrieval_check` tests whether a score is causal; `retrieval_tests` and `induction_and_echo` give what their methods condense.
"""

from headwise.registry import expose
from headwise.score._check import CheckRow, RetrievalCheck, retrieval_check
from headwise.score.induction import induction_and_echo
from headwise.score.retrieval import RetrievalTests, retrieval_tests

__all__ = ["CheckRow", "RetrievalCheck", "RetrievalTests", "induction_and_echo", "retrieval_check", "retrieval_tests"]

expose(__name__)
