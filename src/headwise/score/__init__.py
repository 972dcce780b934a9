"""Score: what every head is worth, by one method a file. Results are `HeadScores`.

`retrieval_check` tests whether a score is causal; `retrieval_tests` and `induction_and_echo` give what their methods condense.
`InfluenceScorer` scores documents by their need of heads, `important_heads` chooses the heads.
`attribute` splits a logit difference into all its parts; `find_circuit` gives path patching stage by stage,
`circuit_edges` and `path_edges` the weighted edges between heads.
`letter_effects`, `label_pattern` and `letter_space` analyse multiple choice, `mlp_effects` adds the MLPs.
"""

from headwise.registry import expose
from headwise.score._check import CheckRow, RetrievalCheck, retrieval_check
from headwise.score._circuit import Circuit
from headwise.score._circuit_edges import Edge, circuit_edges, path_edges
from headwise.score._influence import Influence, InfluenceScorer, important_heads
from headwise.score._letter_space import LetterSpace, Quiz, letter_space
from headwise.score._letters import Effects, LabelPattern, Resample, label_pattern, letter_effects
from headwise.score._mlp_effects import MlpEffects, mlp_effects
from headwise.score._residual import Attribution
from headwise.score.circuit import find_circuit
from headwise.score.induction import induction_and_echo
from headwise.score.logit_attribution import attribute
from headwise.score.retrieval import RetrievalTests, retrieval_tests

__all__ = [
    "Attribution",
    "CheckRow",
    "Circuit",
    "Edge",
    "Effects",
    "Influence",
    "InfluenceScorer",
    "LabelPattern",
    "LetterSpace",
    "MlpEffects",
    "Quiz",
    "Resample",
    "RetrievalCheck",
    "RetrievalTests",
    "attribute",
    "circuit_edges",
    "find_circuit",
    "important_heads",
    "induction_and_echo",
    "label_pattern",
    "letter_effects",
    "letter_space",
    "mlp_effects",
    "path_edges",
    "retrieval_check",
    "retrieval_tests",
]

expose(__name__)
