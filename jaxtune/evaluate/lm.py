"""A jaxtune model for lm-evaluation-harness: log-likelihoods, rolling ones and generation, batched by length.

Requests are tokenised as by the harness's own Hugging Face backend, so that results compare with published
ones: BOS as its tokenizer adds it, contexts cut on the left, rolling windows that predict each token once.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import lm_eval.utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from tqdm import tqdm

from jaxtune.errors import UserError
from jaxtune.infer.continuations import scorer
from jaxtune.infer.generation import cut, generate, prepare
from jaxtune.infer.logprobs import worth_a_compile
from jaxtune.weights.adapters import virtual_tokens


@register_model("jaxtune")
class JaxtuneLM(TemplateLM):
    """For `lm_eval.simple_evaluate(JaxtuneLM(module, params, tokenizer), ...)`.

    Args:
        module, params: a decoder and its parameters, also with adapters.
        tokenizer: a fast transformers tokenizer.
        target: instead of these three, a run, an adapter, or a model directory or hub id.
        batch_size: prompts decoded together.
        max_length: positions to use; default: all that the model knows.
        eos_ids: tokens that end an answer; default: those of the target, else the tokenizer's.
    """

    def __init__(
        self,
        module: Any = None,
        params: Any = None,
        tokenizer: Any = None,
        *,
        target: str | None = None,
        batch_size: int | str = 32,
        max_length: int | None = None,
        max_batch_size: int | None = None,
        eos_ids: Sequence[int] | None = None,
        device: str | None = None,
    ):
        super().__init__()
        if target is not None:
            from jaxtune.infer.source import load_target

            module, params, tokenizer, _, eos_ids = load_target(target)
        self.module, self.params, self.tokenizer = module, prepare(module, params), tokenizer
        self.eos_ids = tuple(eos_ids or (tokenizer.eos_token_id,))
        self.room = worth_a_compile(self.params)
        self.prefix = virtual_tokens(self.params)
        known = module.spec.positions - len(self.prefix)
        self.max_length = min(max_length or known, known)
        self.batch_size = 32 if batch_size == "auto" else int(batch_size)
        self.max_gen_toks = 256
        self.tokenised: dict[str, list[int]] = {}

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        if add_special_tokens is None:
            if string not in self.tokenised:
                self._tokenise([string])
            return self.tokenised[string]
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def _tokenise(self, texts: Iterable[str]) -> None:
        """Replace the tokenised texts by these, with BOS where the tokenizer adds it and they lack it."""
        bos = self.tokenizer.decode(self.prefix_token_id)
        parts: dict[bool, list[str]] = {True: [], False: []}
        for text in dict.fromkeys(texts):
            parts[not (bos and text.startswith(bos))].append(text)
        self.tokenised = {}
        for special, some in parts.items():
            if some:
                ids = self.tokenizer(some, add_special_tokens=special)["input_ids"]
                self.tokenised |= zip(some, ids, strict=True)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        from jaxtune.data.chat import DEFAULT_TEMPLATE

        return self.tokenizer.apply_chat_template(
            chat_history,
            chat_template=None if self.tokenizer.chat_template else DEFAULT_TEMPLATE,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As in the harness, but all texts are tokenised together first."""
        contexts = [context for context, _ in (request.args for request in requests)]
        self._tokenise([c[: len(c.rstrip())] for c in contexts] + ["".join(request.args) for request in requests])
        return super().loglikelihood(requests, disable_tqdm)

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs) -> list[tuple[float, bool]]:
        """(texts, context ids, continuation ids) -> (log-probability of the continuation, is it the greedy one?)."""
        pairs = []
        for _, context, continuation in requests:
            row = [*context, *continuation][-(self.max_length + 1) :]
            at = max(1, len(row) - len(continuation))
            pairs.append((row[:at], row[at:]))
        found: list[Any] = [None] * len(pairs)
        with tqdm(total=len(pairs), disable=disable_tqdm, desc="log-likelihoods") as bar:
            batches, score = scorer(self.module, self.params, pairs)
            for batch in batches:
                for i, result in zip(batch, score(batch), strict=True):
                    found[i] = result
                bar.update(len(batch))
        for (texts, _, _), result in zip(requests, found, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, result)
        return found

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        self._tokenise([request.args[0] for request in requests])
        windows, owners = [], []
        for owner, request in enumerate(requests):
            rolling = lm_eval.utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in map(lm_eval.utils.make_disjoint_window, rolling):
                windows.append((None, *window))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(i)
        found: list[str] = [""] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="generation") as bar:
            for members in groups.values():
                texts = self._generate([requests[i].args[0] for i in members], requests[members[0]].args[1], bar.update)
                for i, text in zip(members, texts, strict=True):
                    found[i] = text
                    self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return found

    def _generate(self, contexts: Sequence[str], asked: dict[str, Any], done: Any) -> list[str]:
        """Continue texts with the same settings."""
        settings = normalize_gen_kwargs(asked, self.max_gen_toks)
        stop = handle_stop_sequences(
            settings["until"], eos=self.tokenizer.decode(self.eot_token_id, skip_special_tokens=False)
        )
        new, room = settings["max_gen_toks"], self.max_length - settings["max_gen_toks"]
        if room < 1:
            raise UserError(
                f"The task asks for {new} new tokens, and the model has {self.max_length} positions: none are left for "
                "the prompt. Set max_gen_toks in the task's generation_kwargs."
            )
        self._tokenise(contexts)
        prompts = [self.tok_encode(text)[-room:] for text in contexts]
        order = list(range(len(prompts)))
        if sum(max(map(len, prompts)) - len(prompt) for prompt in prompts) > self.room:  # else one shape for all
            order.sort(key=lambda i: len(prompts[i]))
        found: list[str] = [""] * len(prompts)
        draws = settings["do_sample"] and settings.get("temperature", 1.0) > 0
        for at in range(0, len(order), self.batch_size):
            batch = order[at : at + self.batch_size]
            # Filled up with copies of its last prompt, the last batch runs the same program as the others.
            filled = batch + [batch[-1]] * (self.batch_size - len(batch) if at else 0)
            out = generate(
                self.module,
                self.params,
                [prompts[i] for i in filled],
                max_new_tokens=new,
                temperature=float(settings.get("temperature", 1.0)) if draws else 0.0,
                top_p=float(settings.get("top_p", 1.0)),
                top_k=int(settings.get("top_k", 0)),
                seed=at,
                eos_ids=self.eos_ids,
                batch_size=self.batch_size,
                watch=lambda _, ids: cut(self.tokenizer.decode(ids), stop)[1],
            )
            for i, ids in zip(batch, out[: len(batch)], strict=True):
                text = self.tokenizer.decode(ids, skip_special_tokens=True)
                found[i] = postprocess_generated_text(text, stop, None)
            done(len(batch))
        return found
