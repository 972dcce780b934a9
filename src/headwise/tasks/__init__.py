"""Tasks: texts, prompts with a known answer, and the measures taken on them. No network, every draw from a generator."""

from headwise.tasks.agreement import Agreement, continuations, make_documents
from headwise.tasks.evaluate import Result, exact_match, generate_match, perplexity, wilson, window_losses
from headwise.tasks.keyvalue import make_keyvalues
from headwise.tasks.needle import NEEDLES, Needle, make_needle, make_needles
from headwise.tasks.passkey import make_passkey, make_passkeys
from headwise.tasks.passphrases import Passphrases, PassphraseSpec, context_lengths, make_passphrases
from headwise.tasks.prompts import Prompt, even_depths, find_span, insert_needle
from headwise.tasks.stories import stories
from headwise.tasks.texts import code, english, windows

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
