"""lm-evaluation-harness on the native engine: its command line with the model `sparsecli`, beside its own `hf`.

    python -m sparsecli.evaluate run --model sparsecli --model_args model=runs/quickstart --tasks TASK

Importing this module registers the model, for `lm_eval.simple_evaluate(model="sparsecli", ...)`; `hf` then opens our
folders, too. It needs the extra `eval`. Texts are cut into tokens as the harness' `hf` does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import lm_eval.models  # noqa: F401  registers `hf` and others
import numpy as np
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import sparsecli.model.auto  # noqa: F401  registers our classes with transformers, for `hf`
from sparsecli.console import Failure, progress
from sparsecli.decode.engine import Engine
from sparsecli.generate.decoder import DecoderOptions
from sparsecli.generate.native_decoder import open_engine
from sparsecli.generate.sampling import make_sampler
from sparsecli.generate.slots import common
from sparsecli.generate.text import TextBuilder
from sparsecli.interchange.model_folder import model_folder
from sparsecli.model.files import read_description
from sparsecli.model.tokenizer import read_tokenizer
from sparsecli.recipe.schema import GenerateSpec

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

MOST_TOKENS = 256
"""New tokens of a generated text, unless the task says otherwise; as in `hf`."""


@register_model("sparsecli")
class HarnessModel(TemplateLM):
    """A model in the native engine.

    Args:
        model: as in `sparsecli evaluate`: a run, a model folder, a Hugging Face folder, a name on the hub, a GGUF file.
        dtype: the type of the weights, as `--dtype`.
        max_length: tokens of context and continuation together; by default the model's context.
        batch_size, max_batch_size, device: what the harness passes; the engine has no use for them.
    Raises:
        Failure: there is no such model, it has an encoder, or the engine is not available.
    """

    def __init__(
        self,
        model: str,
        dtype: str = "auto",
        threads: int | None = None,
        max_length: int | None = None,
        batch_size: Any = None,
        max_batch_size: Any = None,
        device: Any = None,
    ) -> None:
        super().__init__()
        options = DecoderOptions("native", None if dtype == "auto" else dtype, threads=threads)
        with ExitStack() as stack:
            folder = stack.enter_context(model_folder(model))
            description = read_description(folder)
            if description.spec.encoder:
                raise Failure(f"{model}: has an encoder; the harness scores running text")
            self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=False
            )
            self._texts = read_tokenizer(folder, description.spec.vocabulary.size)
            self.engine: Engine = open_engine(folder, description, options)
            self._open = stack.pop_all()  # an import lies in a temporary folder
        self.end_tokens = description.end_tokens
        self.max_length = max_length or description.spec.max_positions
        self.sequence = self.engine.sequence(self.max_length)
        self.held: list[int] = []

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        first = self.tokenizer.decode([self.prefix_token_id])
        if add_special_tokens is None:
            add_special_tokens = not (first and string.startswith(first))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    # -- scoring ----------------------------------------------------------------------------------------------

    def _logits(self, tokens: Sequence[int], count: int) -> np.ndarray:
        """Logits (count, V) after the last `count` of `tokens`. What the sequence holds of their beginning stays."""
        kept = min(common(tokens, self.held), len(tokens) - count)
        try:
            self.sequence.truncate(kept)
        except Failure:  # a sliding window does not hold so much any more
            self.sequence.truncate(0)
            kept = 0
        self.held = list(tokens)
        if len(tokens) - count > kept:
            self.engine.prefill(self.sequence, tokens[kept : len(tokens) - count])
        return self.engine.logits(self.sequence, tokens[len(tokens) - count :])

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        found: dict[int, tuple[float, bool]] = {}
        # Those with the same context follow one another: it is read once.
        order = sorted(range(len(requests)), key=lambda index: requests[index][1] + requests[index][2])
        with progress("scoring", len(order)) as bar:
            for index in order:
                key, context, continuation = requests[index]
                tokens = (context + continuation)[-(self.max_length + 1) :]
                rows = self._logits(tokens[:-1], len(continuation)).astype(np.float64)
                largest = rows.max(axis=1)
                totals = largest + np.log(np.exp(rows - largest[:, None]).sum(axis=1))
                picked = rows[np.arange(len(continuation)), continuation]
                greedy = bool((rows.argmax(axis=1) == continuation).all())
                found[index] = float((picked - totals).sum()), greedy
                if key is not None:
                    self.cache_hook.add_partial("loglikelihood", key, found[index])
                bar.advance()
        return [found[index] for index in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        totals = []
        for request in requests:
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pairs = [(None, *utils.make_disjoint_window(window)) for window in windows]
            totals.append(sum(value for value, _ in self._loglikelihood_tokens(pairs)))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
        return totals

    # -- generation -------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        texts = []
        with progress("generating", len(requests)) as bar:
            for request in requests:
                texts.append(self._continue(*request.args))
                self.cache_hook.add_partial("generate_until", request.args, texts[-1])
                bar.advance()
        return texts

    def _continue(self, context: str, given: dict[str, Any]) -> str:
        """The text after `context` by a task's `generation_kwargs`; unknown ones are refused."""
        known = {"until", "max_gen_toks", "max_new_tokens", "do_sample", "temperature", "top_p", "top_k"}
        if unknown := set(given) - known:
            raise Failure(f"generation_kwargs: {', '.join(sorted(unknown))}: not supported")
        stops = given.get("until") or []
        most = int(given.get("max_gen_toks") or given.get("max_new_tokens") or MOST_TOKENS)
        samples = given.get("do_sample", float(given.get("temperature") or 0) > 0)
        temperature = float(given.get("temperature") or 1.0) if samples else 0.0
        options = GenerateSpec(
            temperature=temperature, top_p=given.get("top_p", 1.0), top_k=given.get("top_k", 0)
        )
        tokens = self.tok_encode(context)[-max(1, self.max_length - most) :]
        sampler = make_sampler(options, seed=0)
        builder = TextBuilder(self._texts, tokens, [stops] if isinstance(stops, str) else stops)
        text, row = "", self._logits(tokens, 1)[0]
        for _ in range(min(most, self.max_length - len(tokens))):
            token = sampler(self.held, row)
            if token in self.end_tokens:
                break
            shown, stopped = builder.feed(token)
            text += shown
            if stopped:
                return text
            if len(self.held) == self.max_length:
                break
            row = self.engine.step(self.sequence, token)
            self.held.append(token)
        return text + builder.end()[0]
