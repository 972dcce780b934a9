"""Tasks: texts, prompts with a known answer, and the measures taken on them. No network, every draw from a generator."""

from .agreement import Agreement, continuations, make_documents
from .evaluate import Result, exact_match, generate_match, perplexity, wilson, window_losses
from .keyvalue import make_keyvalues
from .needle import NEEDLES, Needle, make_needle, make_needles
from .passkey import make_passkey, make_passkeys
from .passphrases import Passphrases, PassphraseSpec, context_lengths, make_passphrases
from .prompts import Prompt, even_depths, find_span, insert_needle
from .stories import stories
from .texts import code, english, windows

__all__ = [
    "Agreement",
    "NEEDLES",
    "Needle",
    "Passphrases",
    "PassphraseSpec",
    "Prompt",
    "Result",
    "code",
    "continuations",
    "context_lengths",
    "english",
    "even_depths",
    "exact_match",
    "find_span",
    "generate_match",
    "make_keyvalues",
    "insert_needle",
    "make_documents",
    "make_needle",
    "make_needles",
    "make_passkey",
    "make_passkeys",
    "make_passphrases",
    "perplexity",
    "stories",
    "wilson",
    "window_losses",
    "windows",
]
