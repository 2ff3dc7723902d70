"""A LLaMA of ours under EleutherAI's lm-evaluation-harness: HellaSwag, ARC, MMLU, and whatever else has a task there. (pip install lm-eval)

    python extras/harness.py --model llama-2-7b --tasks hellaswag arc_challenge --rope yarn --factor 2 --out results/harness.json
    python extras/harness.py --model data/tiny --tasks mine --include my_tasks/ --limit 100        # my_tasks/mine.yaml, on local data

The harness asks a model three things: how probable a continuation is, how probable a whole text is, and how a prompt goes on. Here they
are answered as everywhere in this repository: BOS once, in front (--no-bos: for models that were trained without); text that does not
fit the window is cut, and the result says how often; whole texts are read by eval.py's sliding windows, every token scored once.
docs/harness.md has recipes, and says which data they download.
"""
import hashlib
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the core lies one folder up

import torch
from tqdm import tqdm

from cli import Kept, UserError, field, parse, run, write_json
from eval import Common, load, sliding_windows, window_and_stride
from model import LOSS_CHUNK, stream
from passes import result, rows_at_once, store
from rope import depends_on_length

try:
    from lm_eval.api.model import LM
except ImportError:
    LM = object  # main() says what to install

NEW_TOKENS = 256  # where a task does not say how many, as in the harness
NEW = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the names under which tasks say it


class Harness(LM):
    """Our model as the harness wants it. max_length: tokens read at a time [the model's window]; stride: of the windows over whole texts
    [max_length / 4]; truncate: what is left out of a context that is too long, its beginning ("left") or its middle (as LongBench does).
    keep(key, compute) may return what it kept of an earlier run under the same key."""

    def __init__(self, model, tokenizer, max_length=None, stride=None, bos=True, truncate="left", keep=lambda key, compute: compute()):
        super().__init__()
        self.model, self.tokenizer, self.bos, self.middle, self.keep = model, tokenizer, bos, truncate == "middle", keep
        self.max_length, self.stride = window_and_stride(model, max_length, stride)
        self.truncated = 0
        self.shown = [str(getattr(model, "path", "")), model.config.rope.to_dict(), str(model.tok_embeddings.weight.dtype)]

    # -----------------------------------------------------------------------------------------------------------------
    # What is asked: lists of requests, whose arguments are in `args`

    def loglikelihood(self, requests):
        """[(context, continuation)] -> [(ln p(continuation | context), whether greedy decoding would have said it)]."""
        rows = []
        for context, continuation in (request.args for request in requests):
            before, after = self.split(context, continuation)
            if len(after) > self.max_length:
                raise UserError(f"an answer has {len(after)} tokens and the window {self.max_length}: give a longer --max-length")
            rows.append((self.cut(before, self.max_length + 1 - len(after)) + after, len(after)))
        return self.scored(rows, "likelihoods")

    def loglikelihood_rolling(self, requests):
        """[(text,)] -> [ln p(text)] of whole texts, of any length, as eval.perplexity scores documents: BOS in front, not scored itself."""
        rows, texts = [], []
        for n, (text,) in enumerate(request.args for request in requests):
            ids = self.start(self.tokenizer.encode(text), always=True)
            for begin, end, skip in sliding_windows(len(ids), self.max_length, self.stride):
                rows.append((ids[begin:end + 1], end - begin - skip))
                texts.append(n)
        sums = [0.0] * len(requests)
        for n, (logprob, _) in zip(texts, self.scored(rows, "texts")):
            sums[n] += logprob
        return sums

    def generate_until(self, requests):
        """[(context, settings)] -> [what the model says, up to the first of the strings settings["until"]]."""
        items = []
        for context, settings in (request.args for request in requests):
            new = next((settings[name] for name in NEW if settings.get(name)), NEW_TOKENS)
            if new >= self.max_length:
                raise UserError(f"{new} tokens are to be generated in a window of {self.max_length}: give a longer --max-length")
            if settings.get("num_beams", 1) != 1:
                raise UserError("a task asks for beam search, which there is not here: set num_beams to 1 in its generation_kwargs")
            until = settings.get("until") or []
            until = [until] if isinstance(until, str) else until
            sample = settings.get("do_sample", settings.get("temperature", 0) > 0)
            sampling = (settings.get("temperature", 1.0), settings.get("top_p", 1.0)) if sample else (0.0, 1.0)
            items.append((self.cut(self.start(self.tokenizer.encode(context)), self.max_length - new), (new, *sampling, *until)))
        return self.in_batches(items, "answers", lambda item: item[1], self.continuations)

    # -----------------------------------------------------------------------------------------------------------------
    # Tokens

    def start(self, ids, always=False):
        """The ids with BOS in front, once; an empty context always begins with it: something has to be read first."""
        wanted = (self.bos or always or not ids) and ids[:1] != [self.tokenizer.bos_id]
        return [self.tokenizer.bos_id] * wanted + ids

    def split(self, context, continuation):
        """Ids of both. They are encoded as one text and parted where the context's own ids end: alone, a continuation may have other
        pieces. Spaces at the end of the context go with the continuation, whose first piece they belong to."""
        before = self.tokenizer.encode(context.rstrip())
        whole = self.tokenizer.encode(context + continuation)
        n = min(len(before), len(whole) - 1)  # at least one token is scored, also where the two have become one piece
        return self.start(whole[:n]), whole[n:]

    def cut(self, ids, room):
        """At most `room` ids, with the BOS that they begin with."""
        if len(ids) <= room:
            return ids
        self.truncated += 1
        bos = ids[:1] if ids[0] == self.tokenizer.bos_id and room > 1 else []
        room -= len(bos)
        head = room // 2 if self.middle else 0
        return bos + ids[len(bos):len(bos) + head] + ids[len(ids) - room + head:]

    # -----------------------------------------------------------------------------------------------------------------
    # Batches

    def in_batches(self, items, what, kind, compute):
        """compute() on batches of items (ids, ...) of one kind, the longest first; results in the order of the items."""
        order = sorted(range(len(items)), key=lambda i: (str(kind(items[i])), -len(items[i][0])))
        results, bar = [None] * len(items), tqdm(total=len(items), desc=what, leave=False, disable=None)
        apart = what != "answers" and depends_on_length(self.model.config.rope)  # the longest row would change the angles of the others
        while order:
            first = items[order[0]]
            longest = len(first[0]) + (kind(first)[0] if what == "answers" else 0)            # the cache has room for what is generated
            batch = [i for i in order[:rows_at_once(self.model, longest, generating=what == "answers")]
                     if kind(items[i]) == kind(first) and (not apart or len(items[i][0]) == len(first[0]))]
            order = order[len(batch):]
            rows = [items[i] for i in batch]
            key = [*self.shown, what, hashlib.sha256(repr(rows).encode()).hexdigest()]
            for i, value in zip(batch, self.keep(key, lambda: compute(rows))):
                results[i] = value
            bar.update(len(batch))
        bar.close()
        return results

    def scored(self, rows, what):
        """Rows (ids, n) -> (sum of ln p of the last n ids, whether each was the most probable one)."""
        return [tuple(row) for row in self.in_batches(rows, what, lambda row: 0, self.logprobs)]

    def padded(self, rows):
        """Rows of ids of any lengths as [B, T]. They are filled up behind, where no causal model looks."""
        longest = max(map(len, rows))
        return torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=self.model.device)

    @torch.inference_mode()
    def logprobs(self, rows):
        x = self.padded([ids for ids, _ in rows])
        wanted = torch.zeros_like(x[:, 1:], dtype=torch.bool)                                # [B, T]
        for row, (ids, n) in zip(wanted, rows):
            row[len(ids) - 1 - n:len(ids) - 1] = True
        last = max(1, x.shape[1] - min(len(ids) - n for ids, n in rows))                     # from the first wanted one on
        hidden, targets = self.model.hidden(x[:, :-1], last=last)[wanted[:, -last:]], x[:, 1:][wanted]   # [N, C], [N]
        size, logprob, greedy = max(1, LOSS_CHUNK // self.model.config.vocab_size), [], []
        for h, t in zip(hidden.split(size), targets.split(size)):
            logits = self.model.logits(h)
            logprob.append(logits.log_softmax(dim=-1).gather(-1, t[:, None])[:, 0].cpu().double())
            greedy.append(logits.argmax(dim=-1) == t)
        parts = [n for _, n in rows]
        return [[l.sum().item(), g.all().item()] for l, g in zip(torch.cat(logprob).split(parts), torch.cat(greedy).split(parts))]

    def continuations(self, rows):
        """Rows (ids, (new, temperature, top_p, *until)) -> texts. Ends when every row has said one of its stop strings or EOS."""
        (new, temperature, top_p, *until), eos = rows[0][1], self.tokenizer.eos_id
        prompts, said = [ids for ids, _ in rows], [[] for _ in rows]
        texts = [None] * len(rows)  # of rows that have come to their end
        lengths = [len(ids) for ids in prompts]
        steps = stream(self.model, self.padded(prompts), new, temperature, top_p, (eos,), lengths=lengths)
        for n, tokens in enumerate(steps, start=min(lengths)):
            for i, token in enumerate(tokens.tolist()):
                if texts[i] is None and n >= lengths[i]:
                    said[i] += [token] * (token != eos)
                    text = self.spoken(prompts[i], said[i])
                    ends = [at for stop in until if stop and (at := text.find(stop)) >= 0]
                    if ends or token == eos or len(said[i]) == new:
                        texts[i] = text[:min(ends, default=None)]
            if None not in texts:
                break
        return texts

    def spoken(self, prompt, new):
        """The text of new tokens. With the one before, for SentencePiece takes the space off the beginning of a text."""
        return self.tokenizer.decode(prompt[-1:] + new)[len(self.tokenizer.decode(prompt[-1:])):]


# ---------------------------------------------------------------------------------------------------------------------
# Command


@dataclass
class HarnessConfig(Common):
    tasks: list[str] = field([], "names of tasks or groups: hellaswag, arc_challenge, ... (lm_eval ls tasks lists them)")
    fewshot: int | None = field(None, "solved examples in front of each question [the task's own number]")
    limit: int | None = field(None, "documents of each task, from its beginning [all]")
    include: str = field("", "folder with tasks of your own, as YAML files")
    max_length: int | None = field(None, "tokens the model reads at a time [the model's window]")
    stride: int | None = field(None, "by which the window moves on over whole texts [max-length / 4]; the harness itself takes max-length")
    bos: bool = field(True, "BOS in front of every text")
    truncate: str = field("left", "what is left out of a context that is too long", choices=["left", "middle"])
    by: str = field("", "number in the documents by which scores are also given, as `length` in LongBench-E")
    edges: list[int] = field([4000, 8000], "where one group of --by ends and the next begins")
    seed: int = field(1234, "of the choice of examples: the harness's own")


def task_manager(config):
    """The harness's list of tasks, in which all that are asked for are."""
    from lm_eval.tasks import TaskManager
    if config.include and not Path(config.include).is_dir():
        raise UserError(f"--include {config.include}: no such folder")
    if config.include:  # the harness's own 14,000 take twenty seconds to look through
        manager = TaskManager(include_path=config.include, include_defaults=False)
        if all(manager.match_tasks([task]) for task in config.tasks):
            return manager
    manager = TaskManager(include_path=config.include or None)
    for task in config.tasks:
        if not manager.match_tasks([task]):
            raise UserError(f"--tasks {task}: the harness has no such task (lm_eval ls tasks lists them); your own are found by --include")
    return manager


def grouped(samples, name, edges):
    """Mean of each metric of a task by groups of a number in its documents: {"0-4000": {"documents": n, metric: mean}, ...}."""
    if not all(isinstance(sample["doc"].get(name), (int, float)) for sample in samples):
        return {}
    samples = [sample for sample in samples if sample.get("filter") == samples[0].get("filter")]  # each of several filters has all documents
    edges, table = [0, *sorted(edges)], {}
    for low, high in zip(edges, [*edges[1:], float("inf")]):
        group = [sample for sample in samples if low <= sample["doc"][name] < high]
        metrics = {metric for sample in group for metric in sample["metrics"] if isinstance(sample[metric], (int, float))}
        if group:
            table[f"{low}-{high}" if high < float("inf") else f"{low}+"] = {"documents": len(group)} | {
                metric: sum(sample[metric] for sample in group) / len(group) for metric in sorted(metrics)}
    return table


def main(argv=None):
    config = parse(HarnessConfig, __doc__, argv)
    if LM is object:
        raise UserError("the evaluation harness is not installed: pip install lm-eval")
    if not config.tasks:
        raise UserError("--tasks is empty: name some, such as hellaswag arc_challenge")
    if config.limit is not None and config.limit < 1 or config.fewshot is not None and config.fewshot < 0:
        raise UserError("--limit has to be at least 1, --fewshot at least 0")
    import lm_eval
    from lm_eval.utils import make_table
    started, manager = time.perf_counter(), task_manager(config)
    model, tokenizer = load(config)
    harness = Harness(model, tokenizer, config.max_length, config.stride, config.bos, config.truncate,
                      store(kept := Kept(config.out), model, "harness"))
    print(f"harness    lm_eval {lm_eval.__version__}, window {harness.max_length}, BOS {'once, in front' if config.bos else 'none'}, "
          f"too long contexts lose their {'middle' if harness.middle else 'beginning'}")
    said = lm_eval.simple_evaluate(harness, tasks=config.tasks, num_fewshot=config.fewshot, limit=config.limit, task_manager=manager,
                                   bootstrap_iters=1000, log_samples=bool(config.by), fewshot_random_seed=config.seed)
    print(make_table(said) + (make_table(said, "groups") if said.get("groups") else ""))
    by = {task: grouped(samples, config.by, config.edges) for task, samples in said.get("samples", {}).items()}
    for task, table in by.items():
        if not table:
            print(f"{task}: its documents have no number {config.by}, so there are no groups")
            continue
        print("\n".join(f"{task}, {config.by} {group}: " + ", ".join(f"{k} {v:.4g}" for k, v in row.items()) for group, row in table.items()))
    if harness.truncated:
        print(f"cut: {harness.truncated} contexts did not fit the window of {harness.max_length} tokens")
    if config.out:
        scores, groups = (json.loads(json.dumps(said.get(name, {}), default=float)) for name in ("results", "groups"))  # no numpy numbers
        write_json(config.out, result(
            model, config.seed, results=scores, groups=groups, by=by, fewshot=said["n-shot"],
            documents={task: n["effective"] for task, n in said["n-samples"].items()}, task_versions=said["versions"], limit=config.limit,
            max_length=harness.max_length, stride=harness.stride, bos="once, in front of each text" if config.bos else "none",
            truncate=config.truncate, truncated=harness.truncated, lm_eval=lm_eval.__version__, seconds=time.perf_counter() - started))
        kept.done()
        print(f"wrote {config.out}")


if __name__ == "__main__":
    run(main)
