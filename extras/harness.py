"""A LLaMA of ours under EleutherAI's lm-evaluation-harness: HellaSwag, ARC, MMLU, ...

    python extras/harness.py --model llama-2-7b --tasks hellaswag arc_challenge \\
        --rope yarn --factor 2 --out results/harness.json
    python extras/harness.py --model data/tiny --tasks mine --include my_tasks/   # or your own

It needs pip install lm-eval. docs/harness.md has recipes, and says which data they download.

The harness asks a model three things: how probable a continuation is, how probable a whole text is,
and how a prompt goes on. The answers are computed as everywhere in this repository. BOS stands
once, in front (--no-bos: for models that were trained without). Text that does not fit the window
is cut, and the result says how often. Whole texts are read by eval.py's sliding windows, every
token scored once.
"""
import functools
import hashlib
import json
import sys
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the core lies one folder up

import torch
from tqdm import tqdm

from common.cache import ResultCache
from common.cli import field, parse, run_command
from common.errors import UserError
from common.results import require_numbers, result
from data.tokenizer import Tokenizer
from eval import sliding_windows, window_and_stride
from evaluation.jobs import rows_per_pass
from extras.generation import pad_rows, stream_ragged
from methods import depends_on_length
from model import LLaMA, LOSS_CHUNK
from weights.flags import ModelFlags, load_from_flags

try:
    from lm_eval.api.model import LM
except ImportError:
    LM = object  # main() says what to install

NEW_TOKENS = 256  # where a task does not say how many, as in the harness
NEW_TOKENS_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class ScoredRow(NamedTuple):
    ids: list[int]
    scored: int  # so many ids at the end are scored


class Sampling(NamedTuple):
    new_tokens: int
    temperature: float
    top_p: float
    until: tuple[str, ...]  # an answer ends before the first of them


class Prompt(NamedTuple):
    ids: list[int]
    sampling: Sampling
    seed: int       # of its own, so that repeats of one prompt are sampled independently


def sampling_of(settings: dict, window: int) -> Sampling:
    """A task's generation_kwargs."""
    given = [settings[name] for name in NEW_TOKENS_NAMES if settings.get(name)]
    new_tokens = given[0] if given else NEW_TOKENS
    if new_tokens >= window:
        raise UserError(f"{new_tokens} tokens are to be generated in a window of {window}: give a "
                        "longer --max-length")
    sampled = settings.get("do_sample", settings.get("temperature", 0) > 0)
    unknown = {"num_beams": 1, "repetition_penalty": 1}
    unknown |= {"top_k": 0, "min_p": 0} if sampled else {}
    for name, off in unknown.items():
        if settings.get(name, off) not in (off, None):
            raise UserError(f"a task asks for {name} {settings[name]}, which there is not here: "
                            f"set it to {off} in its generation_kwargs")
    until = settings.get("until") or []
    if isinstance(until, str):
        until = [until]
    if not sampled:
        return Sampling(new_tokens, 0.0, 1.0, tuple(until))
    return Sampling(new_tokens, settings.get("temperature", 1.0), settings.get("top_p", 1.0),
                    tuple(until))


class Harness(LM):
    """A model as the harness wants it. max_length: tokens read at a time [the model's window];
    stride: of the windows over whole texts [max_length / 4]; truncate: a context that is too long
    loses its beginning ("left") or its "middle" (LongBench); seed: of sampled answers."""

    def __init__(self, model: LLaMA, tokenizer: Tokenizer, max_length: int | None = None,
                 stride: int | None = None, bos: bool = True, truncate: str = "left",
                 cache: ResultCache | None = None, seed: int = 0):
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.max_length, self.stride = window_and_stride(model, max_length, stride)
        self.bos = bos
        self.truncate = truncate
        self.seed = seed
        self.truncated = 0  # contexts so far
        self.cache = (cache or ResultCache()).for_model(model, "harness")

    # The three questions: lists of requests, whose arguments are in `args`

    def loglikelihood(self, requests: Sequence) -> list[tuple[float, bool]]:
        """(context, continuation) -> (ln p(continuation | context), whether greedy decoding
        produces the continuation)"""
        rows = []
        for request in requests:
            before, after = self.split(*request.args)
            if len(after) > self.max_length:
                raise UserError(f"an answer has {len(after)} tokens and the window "
                                f"{self.max_length}: give a longer --max-length")
            before = self.cut(before, self.max_length + 1 - len(after))
            rows.append(ScoredRow(before + after, len(after)))
        return self.score(rows, "likelihoods")

    def loglikelihood_rolling(self, requests: Sequence) -> list[float]:
        """(text,) -> ln p(text) of whole texts, of any length, as eval.perplexity scores documents:
        BOS stands in front and is not scored."""
        rows, text_numbers = [], []
        for number, request in enumerate(requests):
            ids = self.start(self.tokenizer.encode(request.args[0]), always=True)
            for begin, end, skip in sliding_windows(len(ids), self.max_length, self.stride):
                rows.append(ScoredRow(ids[begin:end + 1], end - begin - skip))
                text_numbers.append(number)
        sums = [0.0] * len(requests)
        for number, (logprob, _) in zip(text_numbers, self.score(rows, "texts")):
            sums[number] += logprob
        return sums

    def generate_until(self, requests: Sequence) -> list[str]:
        """(context, settings) -> the continuation, up to the first of settings["until"]"""
        prompts = []
        for number, request in enumerate(requests):
            context, settings = request.args
            sampling = sampling_of(settings, self.max_length)
            ids = self.cut(self.start(self.tokenizer.encode(context)),
                           self.max_length - sampling.new_tokens)
            seed = (1_000_003 * self.seed + number) % 2**63 if sampling.temperature > 0 else 0
            prompts.append(Prompt(ids, sampling, seed))
        return self.in_batches(prompts, "answers", lambda prompt: prompt.sampling,
                               self.continuations, generating=True)

    # Tokens

    def start(self, ids: list[int], always: bool = False) -> list[int]:
        """The ids with BOS in front, once. The model has to read something first, so that an empty
        context always begins with it."""
        bos = [self.tokenizer.bos_id]
        wanted = self.bos or always or not ids
        return bos + ids if wanted and ids[:1] != bos else ids

    def split(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of both. They are encoded as one text and parted where the context's own ids end:
        encoded alone, a continuation may have other pieces. Spaces at the end of the context go
        with the continuation, whose first piece they belong to."""
        before = self.tokenizer.encode(context.rstrip())
        whole = self.tokenizer.encode(context + continuation)
        n = min(len(before), len(whole) - 1)  # where both have become one piece, it is scored
        return self.start(whole[:n]), whole[n:]

    def cut(self, ids: list[int], room: int) -> list[int]:
        """At most `room` ids, the BOS that they begin with included."""
        if len(ids) <= room:
            return ids
        self.truncated += 1
        if ids[0] == self.tokenizer.bos_id and room > 1:
            bos, text = ids[:1], ids[1:]
        else:
            bos, text = [], ids
        room -= len(bos)
        head = room // 2 if self.truncate == "middle" else 0
        return bos + text[:head] + text[len(text) - room + head:]

    def text_after(self, prompt: list[int], new: list[int]) -> str:
        """The text of new tokens. Decoded behind the prompt's last one, as SentencePiece takes the
        space off the beginning of a text."""
        before = self.tokenizer.decode(prompt[-1:])
        return self.tokenizer.decode(prompt[-1:] + new)[len(before):]

    # Batches

    def in_batches(self, rows: Sequence, name: str, group_of: Callable[[Any], Hashable],
                   compute: Callable[[list], list], generating: bool = False) -> list:
        """compute() on batches of rows of one group, the longest first; results in rows' order."""
        groups = {}
        for index, row in enumerate(rows):
            groups.setdefault(group_of(row), []).append(index)
        results = [None] * len(rows)
        with tqdm(total=len(rows), desc=name, leave=False, disable=None) as bar:
            for indices in groups.values():
                indices.sort(key=lambda index: -len(rows[index].ids))
                while indices:
                    longest = len(rows[indices[0]].ids)
                    if generating:
                        longest += rows[indices[0]].sampling.new_tokens
                    size = rows_per_pass(self.model, longest, generating)
                    batch = [rows[index] for index in indices[:size]]
                    digest = hashlib.sha256(repr(batch).encode()).hexdigest()
                    values = self.cache.get([name, digest], functools.partial(compute, batch))
                    for index, value in zip(indices, values):
                        results[index] = value
                    bar.update(len(batch))
                    indices = indices[size:]
        return results

    def score(self, rows: list[ScoredRow], name: str) -> list[tuple[float, bool]]:
        """The sum of ln p of the scored ids of each row, and whether each was the most probable."""
        by_length = depends_on_length(self.model.config.rope)

        def group_of(row: ScoredRow) -> int:
            return len(row.ids) if by_length else 0  # a longer row would change the angles

        return [tuple(value) for value in self.in_batches(rows, name, group_of, self.logprobs)]

    @torch.inference_mode()
    def logprobs(self, rows: list[ScoredRow]) -> list[list]:
        """score() of one batch."""
        x = pad_rows([row.ids for row in rows], self.model.device)
        tokens, targets = x[:, :-1], x[:, 1:]                                 # [B, T]
        scored = torch.zeros_like(targets, dtype=torch.bool)                  # [B, T]
        for mask, row in zip(scored, rows):
            end = len(row.ids) - 1
            mask[end - row.scored:end] = True
        first = min(len(row.ids) - 1 - row.scored for row in rows)
        last = max(1, targets.shape[1] - first)  # the last layer computes these positions only
        hidden = self.model.hidden(tokens, last=last)[scored[:, -last:]]      # [N, C]
        targets = targets[scored]                                             # [N]
        parts, greedy = [], []
        size = max(1, LOSS_CHUNK // self.model.config.vocab_size)
        for h, target in zip(hidden.split(size), targets.split(size)):
            logits = self.model.logits(h)                                     # [n, V]
            logprob = logits.log_softmax(dim=-1).gather(-1, target[:, None])[:, 0]
            parts.append(logprob.cpu().double())
            require_numbers(parts[-1], "an answer's probability")
            greedy.append((logits.argmax(dim=-1) == target).cpu())
        counts = [row.scored for row in rows]
        return [[logprob.sum().item(), hits.all().item()] for logprob, hits in
                zip(torch.cat(parts).split(counts), torch.cat(greedy).split(counts))]

    def continuations(self, prompts: list[Prompt]) -> list[str]:
        """The answers to prompts of one sampling. Generation stops when all have ended, by a stop
        string, by EOS or by their number of tokens."""
        sampling = prompts[0].sampling
        eos = self.tokenizer.eos_id
        ids = [prompt.ids for prompt in prompts]
        lengths = [len(row) for row in ids]
        new = [[] for _ in prompts]
        texts = [None] * len(prompts)  # of the prompts whose answer has ended
        steps = stream_ragged(self.model, pad_rows(ids, self.model.device), lengths,
                              sampling.new_tokens, sampling.temperature, sampling.top_p, (eos,),
                              prompts[0].seed)
        for position, tokens in enumerate(steps, start=min(lengths)):
            for i, token in enumerate(tokens.tolist()):
                if texts[i] is not None or position < lengths[i]:
                    continue
                if token != eos:
                    new[i].append(token)
                text = self.text_after(ids[i], new[i])
                stops = [text.find(stop) for stop in sampling.until if stop and stop in text]
                if stops:
                    texts[i] = text[:min(stops)]
                elif token == eos or len(new[i]) == sampling.new_tokens:
                    texts[i] = text
            if None not in texts:
                break
        return texts


# --------------------------------------------------------------------------------------------------
# Command


@dataclass
class HarnessFlags(ModelFlags):
    tasks: list[str] = field([], "names of tasks or groups: hellaswag, arc_challenge, ... (lm_eval "
                             "ls tasks lists them)")
    fewshot: int | None = field(None, "solved examples before each question [the task's number]")
    limit: int | None = field(None, "documents of each task, from its beginning [all]")
    include: str = field("", "folder with tasks of your own, as YAML files")
    max_length: int | None = field(None, "tokens the model reads at a time [the model's window]")
    stride: int | None = field(None, "by which the window moves on over whole texts [max-length / "
                               "4]; the harness itself takes max-length")
    bos: bool = field(True, "BOS in front of every text")
    truncate: str = field("left", "what is left out of a context that is too long",
                          choices=["left", "middle"])
    by: str = field("", "also scores by a number in the documents, as `length` in LongBench-E")
    edges: list[int] = field([4000, 8000], "where one group of --by ends and the next begins")
    seed: int = field(1234, "of the choice of examples, where it is the harness's own, and of "
                      "sampled answers")


def find_tasks(flags: HarnessFlags) -> Any:
    """The harness's TaskManager, which knows all of --tasks."""
    from lm_eval.tasks import TaskManager
    if flags.include:
        if not Path(flags.include).is_dir():
            raise UserError(f"--include {flags.include}: no such folder")
        # The harness's own 14,000 tasks take twenty seconds to look through.
        manager = TaskManager(include_path=flags.include, include_defaults=False)
        if all(manager.match_tasks([task]) for task in flags.tasks):
            return manager
    manager = TaskManager(include_path=flags.include or None)
    for task in flags.tasks:
        if not manager.match_tasks([task]):
            raise UserError(f"--tasks {task}: the harness has no such task (lm_eval ls tasks lists "
                            "them); your own are found by --include")
    return manager


def means_by_group(samples: list, name: str, edges: Sequence[int]) -> dict:
    """Mean of each metric of a task by groups of a number in its documents: {"0-4000":
    {"documents": n, metric: mean}, ...}. {} if the documents have no such number."""
    if not all(isinstance(sample["doc"].get(name), (int, float)) for sample in samples):
        return {}
    means = {}
    bounds = [0, *sorted(edges), float("inf")]
    for low, high in zip(bounds, bounds[1:]):
        # Each of several filters has all documents: the first one's are enough.
        group = [sample for sample in samples if low <= sample["doc"][name] < high
                 and sample.get("filter") == samples[0].get("filter")]
        if not group:
            continue
        metrics = {metric for sample in group for metric in sample["metrics"]
                   if isinstance(sample[metric], (int, float))}
        row = {"documents": len(group)}
        for metric in sorted(metrics):
            row[metric] = sum(sample[metric] for sample in group) / len(group)
        means[f"{low}-{high}" if high < float("inf") else f"{low}+"] = row
    return means


def print_groups(task: str, name: str, groups: dict) -> None:
    """What means_by_group() found."""
    if not groups:
        print(f"{task}: its documents have no number {name}, so there are no groups")
    for group, row in groups.items():
        numbers = ", ".join(f"{key} {value:.4g}" for key, value in row.items())
        print(f"{task}, {name} {group}: {numbers}")


def main(argv: Sequence[str] | None = None) -> None:
    flags = parse(HarnessFlags, __doc__, argv)
    if LM is object:
        raise UserError("the evaluation harness is not installed: pip install lm-eval")
    if not flags.tasks:
        raise UserError("--tasks is empty: name some, such as hellaswag arc_challenge")
    if flags.limit is not None and flags.limit < 1 or (flags.fewshot or 0) < 0:
        raise UserError("--limit has to be at least 1, --fewshot at least 0")
    import lm_eval
    from lm_eval.utils import make_table
    started = time.perf_counter()
    manager = find_tasks(flags)
    model, tokenizer = load_from_flags(flags)
    cache = ResultCache(flags.out)
    harness = Harness(model, tokenizer, flags.max_length, flags.stride, flags.bos,
                      flags.truncate, cache, flags.seed)
    bos = "once, in front of each text" if flags.bos else "none"
    print(f"harness    lm_eval {lm_eval.__version__}, window {harness.max_length}, BOS {bos}, too "
          f"long contexts lose their {flags.truncate.replace('left', 'beginning')}")
    found = lm_eval.simple_evaluate(
        harness, tasks=flags.tasks, num_fewshot=flags.fewshot, limit=flags.limit,
        task_manager=manager, bootstrap_iters=1000, log_samples=bool(flags.by),
        fewshot_random_seed=flags.seed)
    print(make_table(found))
    if found.get("groups"):
        print(make_table(found, "groups"))
    by = {}
    for task, samples in found.get("samples", {}).items():
        by[task] = means_by_group(samples, flags.by, flags.edges)
        print_groups(task, flags.by, by[task])
    if harness.truncated:
        print(f"cut: {harness.truncated} contexts did not fit the window of {harness.max_length} "
              "tokens")
    measured = {"results": found["results"], "groups": found.get("groups", {})}
    measured = json.loads(json.dumps(measured, default=float))  # no numpy numbers
    cache.write_result(result(
        model, flags.seed, **measured, by=by, fewshot=found["n-shot"],
        documents={task: n["effective"] for task, n in found["n-samples"].items()},
        task_versions=found["versions"], limit=flags.limit, max_length=harness.max_length,
        stride=harness.stride, bos=bos, truncate=flags.truncate, truncated=harness.truncated,
        lm_eval=lm_eval.__version__, seconds=time.perf_counter() - started))


if __name__ == "__main__":
    run_command(main)
