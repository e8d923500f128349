"""EleutherAI's lm-evaluation-harness on a model trained here: hundreds of published tasks.

    pip install -e '.[eval]'
    python -m jaxgpt.evaluation.lm_eval --model jaxgpt --model_args init_from=runs/sft --batch_size 16 --tasks arc_easy

takes every flag of the harness's own command; --apply_chat_template uses the template that the model was trained with. From
Python:

    import lm_eval
    from jaxgpt.evaluation.lm_eval import JaxgptLM
    found = lm_eval.simple_evaluate(model=JaxgptLM("runs/sft"), tasks=["hellaswag"])

The harness downloads the data of its tasks, unless they are its own (or local files) already.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxgpt import partition
from jaxgpt.data.chat import Message
from jaxgpt.evaluation import prompts
from jaxgpt.evaluation.generation import generate_answers
from jaxgpt.evaluation.logprobs import encode_after_start, token_scores
from jaxgpt.evaluation.perplexity import text_scores
from jaxgpt.generate.samplers import SamplerConfig
from jaxgpt.partition import MeshConfig
from jaxgpt.runs.load import load_model

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError as error:
    raise ImportError(
        "lm-evaluation-harness is not installed: pip install -e '.[eval]' in the project's folder."
    ) from error

# What stands before a chat in a context. A text could not hold the template's markers: the tokenizer never makes reserved
# tokens of text, so that the messages themselves are passed on.
_CHAT = "<|chat|>"
_MAX_NEW_TOKENS = 256  # the harness's own default


@register_model("jaxgpt")
class JaxgptLM(LM):
    """A finished run as a model of the harness; see `lm_eval.api.model.LM` for what each method is asked.

    init_from: its workdir. batch_size: sequences at a time, rounded up to what the mesh divides. max_gen_toks: the most new
    tokens where a task does not say. Whatever else the harness passes (device, max_batch_size) has no meaning here.
    """

    def __init__(self, init_from: str, batch_size: int | str = 16, max_gen_toks: int = _MAX_NEW_TOKENS, **_: Any):
        super().__init__()
        self.mesh = partition.make_mesh(MeshConfig())
        self.model = load_model(init_from, self.mesh)
        shards = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        wanted = int(batch_size) if str(batch_size).isdigit() else 16  # the harness also says "auto"
        self.batch_size = -(-wanted // shards) * shards
        self.max_gen_toks = int(max_gen_toks)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-prob of the continuation, whether greedy decoding gives it) for each (context, continuation)."""
        limit = self.model.config.max_seq_length + 1
        sequences, lengths = [], []
        for context, continuation in (request.args for request in requests):
            turns, model = self._turns(context)
            prompt_ids, ids = prompts.encode_answer(model, turns, continuation, "lm-eval", as_is=True)
            prompt_ids = prompt_ids if len(prompt_ids) else encode_after_start(model.tokenizer, "")
            sequences.append(prompts.shorten(np.concatenate([prompt_ids, ids]), limit, model.tokenizer.bos_id))
            lengths.append(min(len(ids), limit - 1))
        scores = token_scores(self.model, sequences, mesh=self.mesh, batch_size=self.batch_size)
        return [
            (float(s.logprobs[-n:].sum(dtype=np.float64)), bool(s.is_greedy[-n:].all()))
            for s, n in zip(scores, lengths, strict=True)
        ]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-prob of each whole text, every token with as much context as fits and scored once."""
        ids = [encode_after_start(self.model.tokenizer, request.args[0]) for request in requests]
        stride = self.model.config.max_seq_length  # the harness's windows do not overlap, but for the last
        scores = text_scores(self.model, ids, stride, mesh=self.mesh, batch_size=self.batch_size)
        return [float(score.logprobs.sum(dtype=np.float64)) for score in scores]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each context, up to the first of the texts `until`."""
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(i)
        answers: dict[int, str] = {}
        for members in groups.values():
            options = requests[members[0]].args[1]
            turns = [self._turns(requests[i].args[0]) for i in members]
            until = options.get("until") or ()
            found = generate_answers(
                turns[0][1], [prompts.encode_prompt(model, turn, "lm-eval") for turn, model in turns],
                sampler=_sampler(options), max_new=int(options.get("max_gen_toks", self.max_gen_toks)),
                stop=tuple(text for text in ([until] if isinstance(until, str) else until) if text), seed=0,
                mesh=self.mesh, batch_size=self.batch_size, field="max_gen_toks",
            )  # fmt: skip
            answers |= dict(zip(members, found.texts, strict=True))
        return [answers[i] for i in range(len(requests))]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The chat as a context for the methods above; ValueError where it cannot be one."""
        if self.model.template is None:
            raise ValueError("--apply_chat_template: the model was trained without a chat template.")
        if not add_generation_prompt:
            raise ValueError(
                "--apply_chat_template: tasks that begin the answer themselves (gen_prefix) are not supported."
            )
        return _CHAT + json.dumps([[turn["role"], turn["content"]] for turn in chat_history])

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The template's source, which the harness puts on record."""
        return self.model.template.source if self.model.template is not None else ""

    @property
    def tokenizer_name(self) -> str:
        """What tells models apart in the harness's cache of requests."""
        return f"jaxgpt-{self.model.tokenizer.digest}"

    def _turns(self, context: str) -> tuple[list[Message], Any]:
        """A context as turns, and the model that takes them: with its template only for a chat."""
        if context.startswith(_CHAT):
            return [Message(*turn) for turn in json.loads(context.removeprefix(_CHAT))], self.model
        return [Message("user", context)], dataclasses.replace(self.model, template=None)


def _sampler(options: dict[str, Any]) -> SamplerConfig:
    """The sampler of a task's generation_kwargs: greedy, unless it samples."""
    if not options.get("do_sample", float(options.get("temperature") or 0) > 0):
        return SamplerConfig(temperature=0.0)
    known = {"temperature": float, "top_k": int, "top_p": float, "min_p": float, "repetition_penalty": float}
    return SamplerConfig(**{name: kind(options[name]) for name, kind in known.items() if options.get(name) is not None})


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
