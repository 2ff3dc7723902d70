"""RULER's synthetic tasks: how long a context does a model really use?

(Hsieh et al. 2024, arXiv 2404.06654; github.com/NVIDIA/RULER)

    python extras/ruler.py --model out/smollm2/smollm2-135m-instruct.gguf --lengths 4096 8192 \\
        --text essays/*.txt --template chatml
    python extras/ruler.py --model data/tiny --rope yarn --factor 8 --lengths 512 1024
    python extras/ruler.py --model data/tiny --lengths 256 --rank 10       # nothing is generated

Eleven of the thirteen tasks are here: the other two ask about SQuAD and HotpotQA, which would have
to be downloaded. Prompts, metrics and the 85.6 % of the effective length are the protocol's. Two
things differ, and every result says so. The haystack is yours (--text): RULER's are essays by Paul
Graham, which may not be handed on. The words come from a list of our own (ruler_words.txt).

A prompt and the tokens that it may generate together take at most the length.

--rank k is for small models, which generate no answer that counts: is a right answer more probable
than k - 1 wrong ones of the same form? Chance is 1/k. The wrong ones are words of the prompt as far
as it has any: the other needles' values (niah_multikey), the less frequent words (cwe, fwe). Else
they are drawn as the answer was (the other niah, vt), and having seen the answer is enough.
"""
import dataclasses
import functools
import hashlib
import itertools
import math
import random
import re
import string
import sys
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the core lies one folder up

import numpy as np
from tqdm import tqdm

from common.cache import ResultCache
from common.cli import field, parse, run_command
from common.errors import UserError
from common.results import result
from data.corpus import ensure_corpus, validation_documents
from data.passkey import GARBAGE, encode_inside
from data.sources import read_text
from data.tokenizer import Tokenizer
from eval import k_max
from evaluation.jobs import rows_per_pass
from evaluation.ranking import check_candidates, log_likelihoods, wins
from extras.generation import generate_ragged, pad_rows
from model import LLaMA
from weights.flags import ModelFlags, load_from_flags

FACT = "One of the special magic {kind} for {key} is: {value}."
# The others have two parts: the context with its question, and the beginning of the answer.
ASK_FOR_ONE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. I will "
    "quiz you about the {kind} afterwards.\n{context}\nWhat is the special magic {kind} for "
    "{query} mentioned in the provided text?",
    " The special magic {kind} for {query} mentioned in the provided text is")
ASK_FOR_SEVERAL = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I "
    "will quiz you about the {kind} afterwards.\n{context}\nWhat are all the special magic {kind} "
    "for {query} mentioned in the provided text?",
    " The special magic {kind} for {query} mentioned in the provided text are")
ASK_FOR_VARIABLES = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    "{context}\nQuestion: Find all variables that are assigned the value {query} in the text "
    "above.",
    " Answer: According to the chain(s) of variable assignment in the text above, {num_v} variables"
    " are assigned the value {query}, they are: ")
ASK_FOR_COMMON_WORDS = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{context}\nQuestion: What are the 10 most common "
    "words in the above list?",
    " Answer: The top 10 words that appear most often in the list are:")
ASK_FOR_CODED_WORDS = (
    "Read the following coded text and track the frequency of each coded word. Find the three most "
    "frequently appeared coded words. {context}\nQuestion: Do not provide any explanation. Please "
    "ignore the dots '....'. What are the three most frequently appeared words in the above coded "
    "text?",
    " Answer: According to the coded text above, the three most frequently appeared words are:")
TEMPLATES = {
    "base": "{task}",
    "llama-2-chat": "[INST] {task} [/INST]",
    "chatml": "<|im_start|>user\n{task}<|im_end|>\n<|im_start|>assistant\n",
    "llama-3-chat": "<|start_header_id|>user<|end_header_id|>\n\n{task}<|eot_id|>"
                    "<|start_header_id|>assistant<|end_header_id|>\n\n"}
NOTE = ("published RULER numbers have Paul Graham's essays as haystack and other words as keys: "
        "these do not compare with them")
FACT_DEPTHS = [round(100 * i / 39) for i in range(40)]  # percent of an essay's sentences before it

# No word is a part of another: the metric looks for them inside the model's answer.
WORDS = Path(__file__).with_name("ruler_words.txt").read_text(encoding="utf-8").split("\n\n")
ADJECTIVES, NOUNS = WORDS[0].split(), WORDS[1].split()
PAIRS = [f"{adjective}-{noun}" for adjective in ADJECTIVES for noun in NOUNS]


# --------------------------------------------------------------------------------------------------
# The tasks. Each makes a sample from random numbers. All take the same arguments:
#   size     of the haystack: words of an essay, lines, words of a list
#   length   the budget in tokens, by which two tasks choose their word counts
#   essay    the words of the essay haystack


class Sample(NamedTuple):
    task: str               # context and question
    prefix: str             # the beginning of the answer
    answers: list[str]      # strings that the answer has to hold
    wrong: Iterator[str]    # endless: other strings of the same form, those of the prompt first


def draw(rng: random.Random, kind: str, taken: Collection[str] = ()) -> str:
    """A key or a value that is not taken: seven digits, an adjective and a noun, or a UUID."""
    while True:
        if kind == "numbers":
            word = str(rng.randint(10**6, 10**7 - 1))
        elif kind == "words":
            word = f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"
        else:
            word = str(uuid.UUID(int=rng.getrandbits(128), version=4))
        if word not in taken:
            return word


def draw_letters(rng: random.Random, alphabet: str, letters: int, count: int) -> list[str]:
    """`count` different words of random letters."""
    words = []
    while len(words) < count:
        word = "".join(rng.choices(alphabet, k=letters))
        if word not in words:
            words.append(word)
    return words


def wrong_answers(rng: random.Random, answers: list[str], in_prompt: Iterable[str],
                  draw_another: Callable[[], str]) -> Iterator[str]:
    """Answers that are wrong, none twice: those that stand in the prompt, in random order, then
    others. Nothing is drawn before it is asked for, so prompts are the same with and without."""
    wrong = sorted(set(in_prompt) - set(answers))
    yield from rng.sample(wrong, len(wrong))
    known = {*answers, *wrong}
    while True:
        word = draw_another()
        if word not in known:
            known.add(word)
            yield word


def hide_between_lines(rng: random.Random, lines: list[str], facts: list[str]) -> str:
    """The facts between the lines, in their order, no two at one place, none behind the last."""
    lines = list(lines)
    places = sorted(rng.sample(range(len(lines)), len(facts)))
    for place, fact in reversed(list(zip(places, facts))):
        lines.insert(place, fact)
    return "\n".join(lines)


def hide_in_essay(rng: random.Random, words: list[str], facts: list[str]) -> str:
    """An essay with the facts between its sentences, at random depths."""
    sentences = re.split(r"(?<=[.!?]) ", " ".join(words))
    places = sorted(int(len(sentences) * d / 100) for d in rng.sample(FACT_DEPTHS, len(facts)))
    for place, fact in reversed(list(zip(places, facts))):
        sentences.insert(place, fact)
    return " ".join(sentences)


def niah(rng: random.Random, size: int, length: int, essay: list[str], haystack: str,
         key: str = "words", value: str = "numbers", keys: int = 1, values: int = 1,
         queries: int = 1) -> Sample:
    """Needles in a haystack: `keys` keys have `values` values each, `queries` keys are asked for.

    haystack: "essay", "noise" (one sentence again and again) or "needles" (facts about other keys)
    """
    names = []
    for _ in range(keys):
        names.append(draw(rng, key, names))
    hidden = {name: [draw(rng, value) for _ in range(values)] for name in names}
    facts = [FACT.format(kind=value, key=name, value=v) for name in names for v in hidden[name]]
    rng.shuffle(facts)
    asked = rng.sample(names, queries)
    in_prompt = [v for name in names for v in hidden[name]]

    if haystack == "essay":
        context = hide_in_essay(rng, list(itertools.islice(itertools.cycle(essay), size)), facts)
    else:
        lines = [GARBAGE] * size
        if haystack == "needles":
            others = [(draw(rng, key, names), draw(rng, value)) for _ in range(size)]
            lines = [FACT.format(kind=value, key=name, value=v) for name, v in others]
            in_prompt += [v for _, v in others]
        context = hide_between_lines(rng, lines, facts)

    if queries * values == 1:
        task, prefix = ASK_FOR_ONE
        kind = value.removesuffix("s")
    else:
        task, prefix = ASK_FOR_SEVERAL
        kind = value
    query = asked[-1]
    if queries > 1:
        query = f"{', '.join(asked[:-1])}, and {query}"
    answers = [v for name in asked for v in hidden[name]]
    return Sample(task.format(kind=kind, context=context, query=query),
                  prefix.format(kind=kind, query=query), answers,
                  wrong_answers(rng, answers, in_prompt, lambda: draw(rng, value)))


def assignments(rng: random.Random, size: int, letters: int) -> tuple[str, str, list[str]]:
    """A chain of five variables in noise: VAR A = 12345, VAR B = VAR A, VAR C = VAR B, ..."""
    names = draw_letters(rng, string.ascii_uppercase, letters, 5)
    value = str(rng.randint(10000, 99998))
    chain = [f"VAR {names[0]} = {value}"]
    chain += [f"VAR {name} = VAR {before} " for before, name in zip(names, names[1:])]
    context = hide_between_lines(rng, [GARBAGE] * size, chain)
    task, prefix = ASK_FOR_VARIABLES
    return task.format(context=context, query=value), prefix.format(num_v=5, query=value), names


def variable_tracking(rng: random.Random, size: int, length: int, essay: list[str]) -> Sample:
    """vt: which variables have a value? After a worked example with shorter names."""
    task, prefix, names = assignments(rng, size, letters=5)
    example, example_prefix, example_names = assignments(rng, size=10, letters=3)
    return Sample(f"{example}{example_prefix} {' '.join(example_names)}\n\n{task}", prefix, names,
                  wrong_answers(rng, names, [],
                                lambda: draw_letters(rng, string.ascii_uppercase, 5, 1)[0]))


def numbered(words: list[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, start=1))


def word_list(rng: random.Random, size: int, often: int, seldom: int
              ) -> tuple[str, list[str], list[str]]:
    """The question about a list of `size` words, ten of them, and the others. The ten stand in it
    `often` times, the others `seldom` times."""
    words = rng.sample(vocabulary_of(size), size)
    listed = words[:10] * often + words[10:] * seldom
    rng.shuffle(listed)
    return ASK_FOR_COMMON_WORDS[0].format(context=numbered(listed)), words[:10], words[10:]


def vocabulary_of(size: int) -> list[str]:
    """Single words while they suffice for a list of `size` words, else pairs."""
    single_words = NOUNS + ADJECTIVES
    return single_words if size <= len(single_words) else PAIRS


def common_words(rng: random.Random, size: int, length: int, essay: list[str]) -> Sample:
    """cwe: ten words stand in a list 30 times each, the others 3 times (in less than 4,096 tokens
    6 times and once). After a worked example."""
    if size > len(PAIRS):
        raise UserError(f"cwe at length {length} needs more than the {len(PAIRS):,} words there "
                        "are: leave it out with --tasks")
    if length < 4096:
        example, shown, _ = word_list(rng, 20, often=3, seldom=1)
        task, words, others = word_list(rng, size, often=6, seldom=1)
    else:
        example, shown, _ = word_list(rng, 40, often=10, seldom=3)
        task, words, others = word_list(rng, size, often=30, seldom=3)
    prefix = ASK_FOR_COMMON_WORDS[1]
    return Sample(f"{example}{prefix} {numbered(shown)}\n{task}", prefix, words,
                  wrong_answers(rng, words, others, lambda: rng.choice(vocabulary_of(size))))


def zipf_counts(size: int, vocabulary: int) -> list[int]:
    """How often each word stands in a text of `size` words: rank k has size / (k^2 zeta(2))."""
    return [int(size / (k * k * math.pi**2 / 6)) for k in range(1, vocabulary + 1)]


def frequent_words(rng: random.Random, size: int, length: int, essay: list[str]) -> Sample:
    """fwe: a text of `size` coded words. Rank 1 is dots. The question is for ranks 2 to 4: where
    rounding makes two of them equal, or rank 4 equal to rank 5, the text is a few words shorter."""
    vocabulary = max(4, length // 50)
    counts = [*zipf_counts(size, vocabulary), 0]
    while not counts[1] > counts[2] > counts[3] > counts[4]:
        size -= 1
        counts = [*zipf_counts(size, vocabulary), 0]
    words = ["...", *draw_letters(rng, string.ascii_lowercase, 6, vocabulary)[1:]]
    text = [word for word, count in zip(words, counts) for _ in range(count)]
    rng.shuffle(text)
    task, prefix = ASK_FOR_CODED_WORDS
    return Sample(task.format(context=" ".join(text)), prefix, words[1:4],
                  wrong_answers(rng, words[1:4], set(text) - {"..."},
                                lambda: draw_letters(rng, string.ascii_lowercase, 6, 1)[0]))


class Task(NamedTuple):
    make: Callable[..., Sample]
    new_tokens: int   # that an answer may take
    least_size: int   # of the haystack
    settings: dict

    @property
    def needs_essay(self) -> bool:
        return self.settings.get("haystack") == "essay"


TASKS = {
    "niah_single_1": Task(niah, 128, 1, {"haystack": "noise"}),
    "niah_single_2": Task(niah, 128, 1, {"haystack": "essay"}),
    "niah_single_3": Task(niah, 128, 1, {"haystack": "essay", "value": "uuids"}),
    "niah_multikey_1": Task(niah, 128, 1, {"haystack": "essay", "keys": 4}),
    "niah_multikey_2": Task(niah, 128, 1, {"haystack": "needles"}),
    "niah_multikey_3": Task(niah, 128, 1, {"haystack": "needles", "key": "uuids",
                                           "value": "uuids"}),
    "niah_multivalue": Task(niah, 128, 1, {"haystack": "essay", "values": 4}),
    "niah_multiquery": Task(niah, 128, 1, {"haystack": "essay", "keys": 4, "queries": 4}),
    "vt": Task(variable_tracking, 30, 5, {}),
    "cwe": Task(common_words, 120, 20, {}),
    "fwe": Task(frequent_words, 50, 30, {})}


class TaskPrompt(NamedTuple):
    ids: list[int]
    answers: list[str]
    text: str
    candidates: list[list[int]]  # ids of the answers, then of the wrong ones; none without a rank


@dataclass
class TaskPrompts:
    """Builds the prompts of one length. A prompt is a function of these fields and its index."""
    tokenizer: Tokenizer
    name: str  # of the task
    length: int
    seed: int
    essay: list[str]
    template: str = "{task}"
    rank: int = 0  # candidates for an answer, if they are ranked

    @property
    def task(self) -> Task:
        return TASKS[self.name]

    def sample(self, index: int, size: int) -> TaskPrompt:
        """A prompt with a haystack of this size."""
        # Text is hashed in the same way on every machine.
        rng = random.Random(f"{self.seed} {self.name} {self.length} {index}")
        task, prefix, answers, wrong = self.task.make(rng, size, self.length, self.essay,
                                                      **self.task.settings)
        text = self.template.replace("{task}", task) + prefix
        ids = self.tokenizer.encode(text)
        bos = [self.tokenizer.bos_id]
        if ids[:1] != bos:  # a chat template may begin with it (SmolLM2's does)
            ids = bos + ids
        candidates = []
        if self.rank:
            words = [*answers, *itertools.islice(wrong, self.rank - 1)]
            beginning = " 1. " if self.task.make is common_words else " "  # as in the example
            candidates = [encode_inside(self.tokenizer, beginning + word) for word in words]
        return TaskPrompt(ids, answers, text, candidates)

    def tokens(self, prompt: TaskPrompt) -> int:
        """Of a prompt and its answer: what may be generated, or the longest candidate."""
        if self.rank:
            return len(prompt.ids) + max(map(len, prompt.candidates))
        return len(prompt.ids) + self.task.new_tokens

    def fits(self, prompt: TaskPrompt) -> bool:
        return self.tokens(prompt) <= self.length

    def shortest(self, samples: int) -> int:
        """Tokens that the first `samples` prompts need with the least haystack, answers counted."""
        return max(self.tokens(self.sample(i, self.task.least_size)) for i in range(samples))

    def with_enough_length(self, samples: int) -> "TaskPrompts":
        """These prompts, or those of the next length that holds so many samples. Each length has
        samples of its own."""
        prompts = self
        needed = prompts.shortest(samples)
        while needed > prompts.length:
            prompts = dataclasses.replace(prompts, length=needed)
            needed = prompts.shortest(samples)
        return prompts

    @functools.cached_property
    def size(self) -> int:
        """The haystack that sample 0 has room for, by bisection."""
        most = len(PAIRS) if self.task.make is common_words else math.inf  # words there are
        low, high = self.task.least_size, 2 * self.task.least_size
        while high < most and self.fits(self.sample(0, high)):
            low, high = high, min(2 * high, most)
        while high - low > 1:
            middle = (low + high) // 2
            if self.fits(self.sample(0, middle)):
                low = middle
            else:
                high = middle
        return low

    def build(self, index: int) -> TaskPrompt:
        """sample() with as much haystack as sample 0 has room for, or a little less."""
        size = self.size
        sample = self.sample(index, size)
        while size > self.task.least_size and not self.fits(sample):
            size = max(self.task.least_size, size - max(1, size // 100))
            sample = self.sample(index, size)
        return sample


# --------------------------------------------------------------------------------------------------
# Answers and scores


def greedy_answers(model: LLaMA, tokenizer: Tokenizer, prompts: list[list[int]],
                   new_tokens: int) -> list[str]:
    """Greedy continuations of prompts (lists of ids), at most `new_tokens` each, as texts."""
    lengths = [len(prompt) for prompt in prompts]
    rows = pad_rows(prompts, model.device)                                    # [B, T]
    eos = tokenizer.eos_id
    texts = []
    generated = generate_ragged(model, rows, lengths, new_tokens, stop=(eos,))
    for row, length in zip(generated.tolist(), lengths):
        answer = row[length:length + new_tokens]
        if eos in answer:
            answer = answer[:answer.index(eos)]
        texts.append(tokenizer.decode(answer))
    return texts


def string_match(text: str, answers: list[str]) -> float:
    """RULER's string_match_all of one answer: the share of the strings that occur in it, in upper
    or lower case, in percent."""
    text = re.sub(r"[\x00-\x1f]", "\n", text.strip()).strip().lower()
    return 100 * sum(answer.lower() in text for answer in answers) / len(answers)


def ranking_score(values: list[float], answers: int) -> float:
    """The share of the right answers that are more probable than every wrong one, in percent.
    values: log-likelihoods of the candidates, of which the first `answers` are right."""
    wrong = values[answers:]
    return 100 * sum(wins(true, wrong) for true in values[:answers]) / answers


def effective_length(averages: dict[int, float], threshold: float = 85.6) -> int:
    """The longest length at which, and at every shorter one, the average is at least `threshold`
    (LLaMA-2-7B-chat's at 4,096 tokens); 0 if the shortest has less."""
    return k_max(list(averages), list(averages.values()), threshold)


def score_task(model: LLaMA, prompts: TaskPrompts, samples: int, cache: ResultCache,
               bar: tqdm) -> float:
    """Mean score of a task's samples, in percent."""
    built = [prompts.build(index) for index in range(samples)]
    built.sort(key=lambda prompt: len(prompt.ids))  # a batch is as long as its longest row
    rows = rows_per_pass(model, prompts.length, generating=True)
    scores = []
    for start in range(0, samples, rows):
        batch = built[start:start + rows]
        ids = [prompt.ids for prompt in batch]
        candidates = [prompt.candidates for prompt in batch]
        digest = hashlib.sha256(repr([ids, candidates]).encode()).hexdigest()
        key = [prompts.name, prompts.length, digest]
        if prompts.rank:
            compute = functools.partial(log_likelihoods, model, ids, candidates)
            scores += [ranking_score(values, len(prompt.answers))
                       for values, prompt in zip(cache.get(key, compute), batch)]
        else:
            compute = functools.partial(greedy_answers, model, prompts.tokenizer, ids,
                                        prompts.task.new_tokens)
            scores += [string_match(text, prompt.answers)
                       for text, prompt in zip(cache.get(key, compute), batch)]
        bar.update(len(batch))
    return float(np.mean(scores))


def ruler(model: LLaMA, tokenizer: Tokenizer, lengths: Sequence[int], tasks: Sequence[str],
          samples: int, essay: Sequence[str] = (), seed: int = 42, template: str = "base",
          threshold: float = 85.6, progress: bool = True, cache: ResultCache | None = None,
          rank: int = 0, **notes) -> dict:
    """Scores in percent by task and length. Tasks that do not fit a length are left out there.

    essay: words of the essay haystack; template: a name of TEMPLATES or a text with {task} in it;
    rank: candidates to rank a right answer among, 0 to generate answers; notes: more entries of the
    result. Returns the dict of the JSON file.
    """
    check_candidates(rank)
    started = time.perf_counter()
    lengths = sorted(set(lengths))
    template = TEMPLATES.get(template, template)
    if samples < 1 or lengths[0] < 1:
        raise UserError(f"lengths {lengths[0]}, samples {samples}: both have to be at least 1")
    if template.count("{task}") != 1:
        raise UserError(f"--template {template}: name one of {', '.join(TEMPLATES)}, or give a "
                        "text with {task} in it")
    if not essay and any(TASKS[task].needs_essay for task in tasks):
        raise UserError("the essay haystack has no words: give it some, or choose tasks that have "
                        "another")
    plan, left_out = [], {}
    for length, task in itertools.product(lengths, dict.fromkeys(tasks)):
        prompts = TaskPrompts(tokenizer, task, length, seed, list(essay), template, rank)
        needed = prompts.with_enough_length(samples).length
        if needed == length:
            plan.append(prompts)
        else:
            left_out.setdefault(task, {})[length] = needed
    if not plan:
        needed, task = min((n, task) for task, at in left_out.items() for n in at.values())
        raise UserError(f"no task fits {lengths[-1]} tokens: {task} needs {needed} with this "
                        "tokenizer; give longer --lengths")

    cache = (cache or ResultCache()).for_model(model, "ruler")
    scores = {task: {} for task in tasks}
    by_length = {}
    with tqdm(total=len(plan) * samples, desc="ruler", unit="prompt", leave=False,
              disable=None if progress else True) as bar:
        for prompts in plan:
            bar.set_description(f"ruler, {prompts.name} at {prompts.length}")
            score = score_task(model, prompts, samples, cache, bar)
            scores[prompts.name][prompts.length] = score
            by_length.setdefault(prompts.length, []).append(score)
    scores = {task: values for task, values in scores.items() if values}
    averages = {length: float(np.mean(values)) for length, values in by_length.items()}
    # The threshold is one of the average of all tasks by generation: a part of it says nothing.
    all_were_run = all(set(scores.get(task, {})) == set(lengths) for task in TASKS)
    effective = effective_length(averages, threshold) if all_were_run and not rank else None
    return result(model, seed, scores=scores, averages=averages, effective_length=effective,
                  threshold=threshold, lengths=lengths, samples=samples, left_out=left_out,
                  template=template, rank=rank, chance=100 / rank if rank else 0.0, **notes,
                  seconds=time.perf_counter() - started)


# --------------------------------------------------------------------------------------------------
# Command


@dataclass
class RulerFlags(ModelFlags):
    lengths: list[int] = field(
        [], "tokens of prompt and answer together [one, two and four original windows]")
    tasks: list[str] = field(list(TASKS), "tasks to try", choices=list(TASKS), metavar="TASK")
    samples: int = field(20, "prompts for each task and length; RULER takes 500")
    text: list[str] = field([], "UTF-8 files for the essay haystack, instead of the corpus")
    corpus: str = field("data/corpora/python",
                        "token folder whose validation documents are the essay haystack")
    rank: int = field(0, "instead of generating: is a right answer the most probable of so many "
                      "candidates? Chance is 100/RANK percent")
    template: str = field(
        "base", f"chat markup: {', '.join(TEMPLATES)}, or a text with {{task}} in it")
    threshold: float = field(85.6, "average, in percent, that the effective length needs")
    seed: int = field(42, "of keys, values and places")


def essay_words(flags: RulerFlags, tokenizer: Tokenizer, longest: int) -> tuple[list[str], str]:
    """The words of the essay haystack, and where they come from."""
    words = []
    if not flags.text:
        corpus = ensure_corpus(flags.corpus, tokenizer.path)
        for document in validation_documents(corpus, 512, 2 * longest, tokenizer):
            words += tokenizer.decode(document.tolist()).split()
        return words, f"{len(words):,} words of held-out documents of {flags.corpus}"
    for path in flags.text:
        text = read_text(path) if Path(path).is_file() else None
        if text is None:
            raise UserError(f"--text {path}: no such file, or not UTF-8 text")
        words += text.split()
    if not words:
        raise UserError("--text: there is no word in it")
    return words, f"{len(words):,} words of {', '.join(flags.text)}"


def print_scores(measured: dict) -> None:
    """A line for each task, a column for each length."""
    lengths = list(measured["averages"])
    print("\n" + "task".ljust(18) + "".join(f"{length:>8}" for length in lengths))
    for name, scores in [*measured["scores"].items(), ("average", measured["averages"])]:
        cells = [f"{scores[n]:8.1f}" if n in scores else "-".rjust(8) for n in lengths]
        print(name.ljust(18) + "".join(cells))
    for task, at in measured["left_out"].items():
        reasons = [f"{length} (needs {needed})" for length, needed in at.items()]
        print(f"left out: {task} at {', '.join(reasons)}")
    judged = "greedy"
    if measured["rank"]:
        judged = f"ranked among {measured['rank']} candidates, chance {measured['chance']:.1f}"
    conditions = f"{measured['samples']} samples each, {judged}; {measured['seconds']:.1f} s"
    if measured["rank"]:
        print(f"no effective length, as that is defined for generated answers ({conditions})")
    elif measured["effective_length"] is None:
        print(f"no effective length, as only a part of the {len(TASKS)} tasks was run "
              f"({conditions})")
    else:
        print(f"effective length {measured['effective_length']} (average at least "
              f"{measured['threshold']:g}, there and at every shorter length; {conditions})")


def main(argv: Sequence[str] | None = None) -> None:
    flags = parse(RulerFlags, __doc__, argv)
    if not 0 <= flags.threshold <= 100:
        raise UserError(f"--threshold {flags.threshold}: give a percentage, from 0 to 100")
    model, tokenizer = load_from_flags(flags)
    L = model.config.original_window
    lengths = flags.lengths or [L, 2 * L, 4 * L]
    essay, haystack = [], "no essays"
    if any(TASKS[task].needs_essay for task in flags.tasks):
        essay, haystack = essay_words(flags, tokenizer, max(lengths))
    print(f"haystack   {haystack}\nnote       {NOTE}")
    cache = ResultCache(flags.out)
    measured = ruler(model, tokenizer, lengths, flags.tasks, flags.samples, essay, flags.seed,
                     flags.template, flags.threshold, cache=cache, rank=flags.rank,
                     haystack=haystack, note=NOTE)
    print_scores(measured)
    cache.write_result(measured)


if __name__ == "__main__":
    run_command(main)
