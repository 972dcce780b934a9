"""A task as a vector for every head: t (L, H, D), how much of it each head takes, alpha (L, H), and the file that keeps both.

Letters: L layers, H query heads, D head dim, C width of the model, M prompts, R tasks trained side by side, B rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headwise.attach import Attachment, attach, find_stack, fingerprint
from headwise.attach.projection import head_weights, output_projection
from headwise.checks import Meta, finite, plain_meta, whole
from headwise.edits import Edit, HeadEdits
from headwise.errors import ArtifactError, EditError, WrongModelError
from headwise.steer._injection import Injection, inject
from headwise.storage import StrPath
from headwise.tasks.icl import Pair, Template
from headwise.units import Fingerprint, HeadScores, HeadSet

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

METHOD = "soft-injection"


@dataclass(frozen=True, eq=False)
class TaskEmbedding:
    """One task, learned from examples, that a prompt without examples can use.

    vectors (L, H, D) float32: mean head outputs at the last token of prompts with examples. alpha (L, H) float32 in [0, 1]: the share
    that each head takes of its vector at the last token of the prompt.

    >>> from headwise.hub import load_model
    >>> model, tokenizer = load_model("tiny-random-llama")
    >>> pairs = [(letter, letter.upper()) for letter in "abcdefghijklmnop"]
    >>> task = TaskEmbedding.fit(model, tokenizer, pairs, prompts=2, shots=2, steps=2)
    >>> tuple(task.vectors.shape), task.edits()[0].op
    ((3, 4, 16), 'mix_vector')
    >>> with task.attach(model):
    ...     _ = model.generate(**tokenizer(task.template.ask("q"), return_tensors="pt"), max_new_tokens=2, do_sample=False)
    """

    vectors: Tensor
    alpha: Tensor
    fingerprint: Fingerprint
    template: Template = field(default_factory=Template)
    meta: Meta = field(default_factory=dict)
    history: tuple[tuple[int, float], ...] = ()  # (step, validation loss); not saved

    def __post_init__(self) -> None:
        shape = (self.fingerprint.layers, self.fingerprint.heads)
        if self.vectors.ndim != 3 or self.vectors.shape[:2] != shape or tuple(self.alpha.shape) != shape:
            raise EditError(
                f"vectors {tuple(self.vectors.shape)} and alpha {tuple(self.alpha.shape)} must be (L, H, D) and (L, H); (L, H) is {shape}"
            )
        if not bool(((self.alpha >= 0) & (self.alpha <= 1)).all()):
            raise EditError(
                f"alpha reaches from {self.alpha.min():.3g} to {self.alpha.max():.3g}; it must lie in [0, 1]"
            )
        object.__setattr__(self, "vectors", self.vectors.detach().float().cpu())
        object.__setattr__(self, "alpha", self.alpha.detach().float().cpu())
        object.__setattr__(self, "meta", plain_meta(self.meta, EditError))

    @classmethod
    def fit(
        cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], **options: Any
    ) -> TaskEmbedding:
        """Learn one task from (input, output) pairs; the options are those of `fit_tasks`."""
        from headwise.steer._soft_fit import fit_tasks  # it makes what this file defines

        return fit_tasks(model, tokenizer, {"task": pairs}, **options)["task"]

    def edits(self) -> HeadEdits:
        """The same as data: one `mix_vector` edit of all heads, at the last token of the prompt."""
        L, H, D = self.vectors.shape
        heads = [(layer, head) for layer in range(L) for head in range(H)]
        units = HeadSet.of(heads, weights=self.alpha.flatten().double().tolist())
        edit = Edit.mix_vector(units, 1.0, self.vectors.reshape(L * H, D), tokens="last", phase="prefill")
        words = {"question": self.template.question, "between": self.template.between}
        return HeadEdits.of(edit, fingerprint=self.fingerprint, method=METHOD, meta={**self.meta, **words})

    @classmethod
    def from_edits(cls, edits: HeadEdits) -> TaskEmbedding:
        """The inverse of `edits()`. Raises ArtifactError for edits that are something else."""
        if len(edits) != 1 or edits[0].op != "mix_vector" or edits.fingerprint is None or edits[0].tensor is None:
            raise ArtifactError("no task embedding: that is one mix_vector edit with a fingerprint of its model")
        edit, made_for = edits[0], edits.fingerprint
        if str(edit.tokens) != "last" or edit.phase != "prefill":
            raise ArtifactError("no task embedding: its edit acts on the last token of the prompt")
        rows = [(unit.layer, unit.index) for unit in edit.units]
        assert edit.tensor is not None
        vectors = torch.zeros(made_for.layers, made_for.heads, edit.tensor.shape[1])
        alpha = torch.zeros(made_for.layers, made_for.heads)
        layers, heads = (torch.tensor(numbers) for numbers in zip(*rows, strict=True))
        vectors[layers, heads] = edit.tensor.float()
        alpha[layers, heads] = edit.strengths()
        meta = dict(edits.meta)
        default = Template()
        template = Template(str(meta.pop("question", default.question)), str(meta.pop("between", default.between)))
        return cls(vectors, alpha, made_for, template, meta)

    def save(self, path: StrPath) -> None:
        """Write a `HeadEdits` file: `name.json` and `name.safetensors`; `headwise generate --edits` takes it too."""
        self.edits().save(path)

    @classmethod
    def load(cls, path: StrPath) -> TaskEmbedding:
        """Read what `save` wrote. Raises ArtifactError."""
        return cls.from_edits(HeadEdits.load(path))

    def check(self, model: nn.Module) -> None:
        """Raises WrongModelError where the model is another one, or its heads have another size."""
        self.fingerprint.require(fingerprint(model), "the task embedding")
        size, mine = find_stack(model).head_dim, self.vectors.shape[-1]
        values = getattr(find_stack(model).modules[0], "v_head_dim", size)  # MLA: outputs have the size of the values
        if mine != values:
            raise WrongModelError(f"the task embedding has heads of {mine} entries, those of the model have {values}")

    def attach(self, model: nn.Module) -> Attachment:
        """Put the task into the model: a context manager, or a lasting handle with `detach()`."""
        self.check(model)
        return attach(model, edits=self.edits())

    def scores(self) -> HeadScores:
        """alpha as scores of the heads: which of them carry the task."""
        task = str(self.meta.get("task", "own pairs"))
        return HeadScores(values=self.alpha, method=METHOD, data=task, fingerprint=self.fingerprint)

    def with_alpha(self, alpha: Tensor | TaskEmbedding | float) -> TaskEmbedding:
        """This task's vectors with other shares: a table, those of another task, or one number for all heads."""
        table = alpha.alpha if isinstance(alpha, TaskEmbedding) else alpha
        return replace(self, alpha=torch.as_tensor(table, dtype=torch.float32).expand(self.alpha.shape).clone())

    def hard(self, threshold: float = 0.5) -> TaskEmbedding:
        """Every share above the threshold becomes 1, the others 0."""
        return self.with_alpha((self.alpha > finite("threshold", threshold, EditError)).float())

    def top(self, k: int) -> TaskEmbedding:
        """The k largest shares as they are, the others 0: which heads suffice?"""
        whole("k", k, 0, EditError, high=self.alpha.numel())
        kept = torch.zeros(self.alpha.numel()).index_fill_(
            0, self.alpha.flatten().argsort(descending=True, stable=True)[:k], 1.0
        )
        return self.with_alpha(self.alpha * kept.view_as(self.alpha))

    @torch.no_grad()
    def residual(self, model: nn.Module) -> Tensor:
        """(L, C) float32: what the vectors add to the residual stream of each layer, sum_h alpha_h t_h W_O^h.

        With the head outputs scaled by 1 - alpha this constant is the whole injection: nothing of t is needed at run time.
        """
        self.check(model)
        stack = find_stack(model)
        parts = []
        for layer in range(stack.layers):
            weights = head_weights(output_projection(stack, layer), stack.heads).float().cpu()  # (H, D, C)
            parts.append(torch.einsum("h,hd,hdc->c", self.alpha[layer], self.vectors[layer], weights))
        return torch.stack(parts)


def serve(model: nn.Module, tasks: Sequence[TaskEmbedding], *, columns: Tensor | None = None) -> Attachment:
    """One task a row of the batch: row b is injected with `tasks[b]`, at the last token of its prompt, or in column `columns[b]`.

    Works under `generate` with a cache and with padding on either side; a batch of another size raises AttachError when it runs.
    """
    if not tasks:
        raise EditError("tasks is empty; give one task embedding a row of the batch")
    for task in tasks:
        task.check(model)
    return inject(model, injection_of(tasks, columns))


def injection_of(tasks: Sequence[TaskEmbedding], columns: Tensor | None = None) -> Injection:
    """The row-wise form, R = len(tasks)."""
    return Injection(torch.stack([t.alpha for t in tasks]), torch.stack([t.vectors for t in tasks]), columns)
