"""RULER's synthetic tasks: how long a context does a model really use? (Hsieh et al. 2024, arXiv 2404.06654; github.com/NVIDIA/RULER)

    python extras/ruler.py --model out/smollm2/smollm2-135m-instruct.gguf --lengths 4096 8192 --text essays/*.txt --template chatml
    python extras/ruler.py --model data/tiny --rope yarn --factor 8 --lengths 512 1024 --samples 20 --out results/ruler.json

Eleven of the thirteen tasks; the other two ask about SQuAD and HotpotQA, which have to be downloaded. Prompts, metrics and the 85.6 %
of the effective length are the protocol's. What differs is said with every result: the haystack (RULER's are essays by Paul Graham, which
may not be handed on: --text), and the words, which come from a small list of our own, as pairs "quiet-harbour" or alone in cwe.

A prompt and the tokens that it may generate together take at most the length. How much haystack that leaves is found by bisection.
"""
import hashlib
import math
import random
import re
import string
import sys
import time
import uuid
from dataclasses import dataclass
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the core lies one folder up

import numpy as np
import torch
from tqdm import tqdm

from cli import Kept, UserError, field, parse, run, write_json
from data.passkey import GARBAGE
from data.prepare import ensure_corpus, read_text
from eval import Common, load, validation_documents
from model import generate
from passes import result, rows_at_once, store
from weights import original_window

NEEDLE = "One of the special magic {kind} for {key} is: {value}."
DEPTHS = [round(100 * i / 39) for i in range(40)]  # percent of an essay's sentences in front of a needle
SEARCHED = ("Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you about the {kind} "
            "afterwards.\n{context}\nWhat are all the special magic {kind} for {query} mentioned in the provided text?",
            " The special magic {kind} for {query} mentioned in the provided text are")
TRACKED = ("Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
           "Question: Find all variables that are assigned the value {query} in the text above.",
           " Answer: According to the chain(s) of variable assignment in the text above, {num_v} variables are assigned the value {query}, "
           "they are: ")
LISTED = ("Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that appear most often.\n"
          "{context}\nQuestion: What are the 10 most common words in the above list?",
          " Answer: The top 10 words that appear most often in the list are:")
CODED = ("Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared coded words. "
         "{context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently appeared "
         "words in the above coded text?", " Answer: According to the coded text above, the three most frequently appeared words are:")
TEMPLATES = {"base": "{task}", "llama-2-chat": "[INST] {task} [/INST]", "chatml": "<|im_start|>user\n{task}<|im_end|>\n<|im_start|>assistant\n",
             "llama-3-chat": "<|start_header_id|>user<|end_header_id|>\n\n{task}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"}

# No word is a part of another: the metric looks for them inside what the model says.
ADJECTIVES = """amber ancient autumn azure bitter bold brave brief bright broad broken calm careful clever cloudy cold crimson crisp curious dark
deep distant double dusty eager early elder empty faint famous fierce fine first foggy fresh gentle giant glad golden grand grateful hasty
heavy hidden hollow honest humble icy idle jolly keen kind lively lonely loyal lucky mellow merry mild misty modest narrow neat
noble northern oaken odd olive orange pale patient plain polite proud purple quick quiet rapid rare restless rough royal rusty scarlet secret
shiny silent silver simple sleepy slow smooth solid steady stormy strange sturdy sudden swift tall tender thirsty timid tiny upper urgent vast
velvet violet vivid wandering warm weary western wild winter wise witty wooden yellow young zealous""".split()
NOUNS = """acorn airport anchor apple avenue badge bakery balcony banner barrel basket beach bell blanket bottle bridge bucket butter button
cabin camera candle canyon carpet castle cellar chapel cherry chimney circle city clock coin compass copper corner cottage cradle crystal
curtain desert diary dinner doctor dolphin donkey drum eagle engine falcon feather ferry field finger fountain garden gate glove guitar hammer
harbour hedge helmet hill honey island jacket jewel journey kettle kitchen ladder lake lantern lemon letter library lion magnet map marble
market meadow melon mirror monkey mountain museum napkin needle ocean onion orchard otter paddle palace parrot pencil pepper piano pillow
planet pocket potato prairie puzzle rabbit radio river rocket saddle sailor school shadow shelf shoulder spider spoon station stone sugar
sunset teacher temple thread ticket tiger tower train trumpet tunnel umbrella valley village violin wagon wallet window wizard zebra""".split()


# ---------------------------------------------------------------------------------------------------------------------
# The tasks. Each makes a sample from a random.Random: (context and question, beginning of the answer, strings that the answer has to hold).
# `size` counts what the haystack is made of, `length` is the budget in tokens, `essay` is a list of words.


def draw(rng, kind):
    """A key or a value: seven digits, an adjective and a noun, or a UUID."""
    if kind == "numbers":
        return str(rng.randint(10**6, 10**7 - 1))
    if kind == "words":
        return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def unlike(rng, kind, others):
    """A key that is none of `others`."""
    while (key := draw(rng, kind)) in others:
        pass
    return key


def scatter(rng, lines, needles):
    """The needles between the lines, in their order, no two at one place and none behind the last line."""
    for shift, place in enumerate(sorted(rng.sample(range(len(lines)), len(needles)))):
        lines.insert(place + shift, needles[shift])
    return lines


def at_depths(rng, words, needles):
    """An essay, its sentences parted by needles at random depths."""
    sentences = re.split(r"(?<=[.!?]) ", " ".join(words))
    places = [0, *sorted(int(len(sentences) * depth / 100) for depth in rng.sample(DEPTHS, len(needles))), len(sentences)]
    parts = [" ".join(sentences[a:b]) for a, b in zip(places, places[1:])]
    return " ".join(part for pair in zip(parts, [*needles, ""]) for part in pair if part)


def niah(rng, size, length, essay, haystack, key="words", value="numbers", keys=1, values=1, queries=1):
    """Needles in a haystack. With one answer the question is in the singular."""
    names = []
    for _ in range(keys):
        names.append(unlike(rng, key, names))
    hidden = [[draw(rng, value) for _ in range(values)] for _ in names]
    needles = [NEEDLE.format(kind=value, key=name, value=v) for name, several in zip(names, hidden) for v in several]
    rng.shuffle(needles)
    asked = rng.sample(range(keys), queries)
    if haystack == "essay":
        context = at_depths(rng, (essay * (-(-size // len(essay))))[:size], needles)
    else:
        lines = [GARBAGE if haystack == "noise" else NEEDLE.format(kind=value, key=unlike(rng, key, names), value=draw(rng, value))
                 for _ in range(size)]
        context = "\n".join(scatter(rng, lines, needles))
    task, prefix, kind = *SEARCHED, value
    if queries * values == 1:
        task, prefix = (t.replace("Some", "A").replace("are all", "is").replace("are", "is") for t in (task, prefix))
        kind = value[:-1]
    *before, last = (names[i] for i in asked)
    query = f"{', '.join(before)}, and {last}" if before else last
    return task.format(kind=kind, context=context, query=query), prefix.format(kind=kind, query=query), [v for i in asked for v in hidden[i]]


def tracking(rng, size, length, essay, letters=5, hops=4):
    """Variable tracking (vt): a chain of four assignments in noise, after a worked example with shorter names."""
    names = []
    while len(names) < hops + 1:
        name = "".join(rng.choices(string.ascii_uppercase, k=letters))
        names += [name] * (name not in names)
    value = str(rng.randint(10000, 99998))
    chain = [f"VAR {names[0]} = {value}", *(f"VAR {b} = VAR {a} " for a, b in zip(names, names[1:]))]
    context = "\n".join(scatter(rng, [GARBAGE] * size, chain))
    task, prefix = TRACKED[0].format(context=context, query=value), TRACKED[1].format(num_v=hops + 1, query=value)
    if letters == 5:
        *example, answer = tracking(rng, 10, length, essay, letters=3)
        task = "".join(example) + " " + " ".join(answer) + "\n\n" + task
    return task, prefix, names


def common_words(rng, size, length, essay):
    """cwe: ten words stand in a list 30 times each, the others 3 times (6 and 1 in less than 4,096 tokens), after a worked example."""
    def listed(size, often, seldom):
        words = rng.sample(NOUNS + ADJECTIVES if size <= len(NOUNS + ADJECTIVES) else PAIRS, size)
        numbered = words[:10] * often + words[10:] * seldom
        rng.shuffle(numbered)
        return LISTED[0].format(context=enumerated(numbered)), words[:10]

    if size > len(PAIRS):
        raise UserError(f"cwe at length {length} needs more than the {len(PAIRS):,} words there are: leave it out with --tasks")
    example, answer = listed(20, 3, 1) if length < 4096 else listed(40, 10, 3)
    task, common = listed(size, 6, 1) if length < 4096 else listed(size, 30, 3)
    return f"{example}{LISTED[1]} {enumerated(answer)}\n{task}", LISTED[1], common


PAIRS = [f"{a}-{n}" for a in ADJECTIVES for n in NOUNS]


def enumerated(words):
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, start=1))


def frequent_words(rng, size, length, essay):
    """fwe: of `size` words, rank k occurs size / (k^2 zeta(2)) times. Rank 1 is dots; ranks 2 to 4 are asked for. Where rounding would make
    two of them equal, or the fourth equal to the fifth, the text is a few words shorter."""
    counts = []
    while not (counts[1:2] and counts[1] > counts[2] > counts[3] > (counts[4] if len(counts) > 4 else 0)):
        counts = [int(size / (k * k * math.pi**2 / 6)) for k in range(1, max(4, length // 50) + 1)]
        size -= 1
    words = []
    while len(words) < len(counts):
        word = "".join(rng.choices(string.ascii_lowercase, k=6))
        words += [word] * (word not in words)
    words[0] = "..."
    text = [word for word, count in zip(words, counts) for _ in range(count)]
    rng.shuffle(text)
    return CODED[0].format(context=" ".join(text)), CODED[1], words[1:4]


# name: (function, its settings, tokens to generate, least size)
TASKS = {"niah_single_1": (niah, {"haystack": "noise"}, 128, 1),
         "niah_single_2": (niah, {"haystack": "essay"}, 128, 1),
         "niah_single_3": (niah, {"haystack": "essay", "value": "uuids"}, 128, 1),
         "niah_multikey_1": (niah, {"haystack": "essay", "keys": 4}, 128, 1),
         "niah_multikey_2": (niah, {"haystack": "needles"}, 128, 1),
         "niah_multikey_3": (niah, {"haystack": "needles", "key": "uuids", "value": "uuids"}, 128, 1),
         "niah_multivalue": (niah, {"haystack": "essay", "values": 4}, 128, 1),
         "niah_multiquery": (niah, {"haystack": "essay", "keys": 4, "queries": 4}, 128, 1),
         "vt": (tracking, {}, 30, 5), "cwe": (common_words, {}, 120, 20), "fwe": (frequent_words, {}, 50, 30)}


class Prompts:
    """Builds a task's prompts of one length for one tokenizer: a sample is a function of (seed, task, length, index) and of the haystack."""

    def __init__(self, tokenizer, task, length, seed, essay, template="{task}"):
        self.tokenizer, self.length, self.essay, self.template = tokenizer, length, essay, template
        self.make, self.settings, self.new, self.least = TASKS[task]
        self.name, self.size = f"{seed} {task} {length}", None

    def sample(self, index, size):
        """(ids of the prompt, answers, text of the prompt)."""
        rng = random.Random(f"{self.name} {index}")  # a string: hashed by SHA-512, the same on every machine
        task, prefix, answers = self.make(rng, size, self.length, self.essay, **self.settings)
        text = self.template.replace("{task}", task) + prefix
        ids, bos = self.tokenizer.encode(text), [self.tokenizer.bos_id]
        return (ids if ids[:1] == bos else bos + ids), answers, text  # once, where a chat template begins with it (SmolLM2's)

    def fits(self, index, size):
        return len(self.sample(index, size)[0]) + self.new <= self.length

    def shortest(self, samples):
        """Tokens that prompts with the least haystack need, the answer counted: all `samples` looked at where the length is close to that."""
        ample = 2 * (len(self.sample(0, self.least)[0]) + self.new) < self.length
        return max(len(self.sample(i, self.least)[0]) for i in range(1 if ample else samples)) + self.new

    def build(self, index):
        """Sample `index` with as much haystack as sample 0 has room for, or a little less."""
        if self.size is None:
            low, high = self.least, 2 * self.least
            most = len(PAIRS) if self.make is common_words else math.inf  # where the words end
            while high < most and self.fits(0, high):
                low, high = high, min(2 * high, most)
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if self.fits(0, middle) else (low, middle)
            self.size = low
        size = self.size
        while len((sample := self.sample(index, size))[0]) + self.new > self.length and size > self.least:
            size = max(self.least, size - max(1, size // 100))
        return sample


# ---------------------------------------------------------------------------------------------------------------------
# Answers and scores


def answers_to(model, tokenizer, prompts, new):
    """Greedy continuations of prompts (lists of ids), at most `new` tokens each, as texts."""
    lengths = [len(p) for p in prompts]
    rows = np.zeros((len(prompts), max(lengths)), np.int64)
    for row, prompt in zip(rows, prompts):
        row[:len(prompt)] = prompt
    out = generate(model, torch.from_numpy(rows).to(model.device), new, lengths=lengths, stop=(tokenizer.eos_id,)).tolist()
    said = [row[n:n + new] for row, n in zip(out, lengths)]
    return [tokenizer.decode(s[:s.index(tokenizer.eos_id)] if tokenizer.eos_id in s else s) for s in said]


def score(text, answers):
    """RULER's string_match_all of one answer: the share of the strings that occur in it, in upper or lower case, in percent."""
    text = re.sub(r"[\x00-\x1f]", "\n", text.strip()).strip().lower()
    return 100 * sum(answer.lower() in text for answer in answers) / len(answers)


def effective_length(averages, threshold=85.6):
    """The longest length at which, and at every shorter one, the average is at least `threshold` (what LLaMA-2-7B-chat has at 4,096 tokens);
    0 if it is not reached at the shortest."""
    best = 0
    for length, average in sorted(averages.items()):
        if average < threshold:
            break
        best = length
    return best


def ruler(model, tokenizer, lengths, tasks, samples, essay=(), seed=42, template="base", threshold=85.6, progress=True,
          keep=lambda key, compute: compute(), **notes):
    """Scores in percent by task and length. keep(key, compute) may return what it kept of an earlier run under the same key: a key names all
    that a batch of answers follows from but the weights. Returns the dict of the JSON file, in which `notes` are too."""
    lengths, started = sorted(set(lengths)), time.perf_counter()
    if samples < 1 or lengths[0] < 1:
        raise UserError(f"lengths {lengths[0]}, samples {samples}: both have to be at least 1")
    template = TEMPLATES.get(template, template)
    if template.count("{task}") != 1:
        raise UserError(f"--template {template}: name one of {', '.join(TEMPLATES)}, or give a text with {{task}} in it")
    if not essay and any(TASKS[task][1].get("haystack") == "essay" for task in tasks):
        raise UserError("the essay haystack has no words: give it some, or choose tasks that have another")
    plan, left_out = [], {}
    for length, task in product(lengths, dict.fromkeys(tasks)):
        prompts = Prompts(tokenizer, task, length, seed, list(essay), template)
        if prompts.shortest(samples) <= length:
            plan.append((task, length, prompts))
        else:  # needed: the next greater length that holds this task's samples
            needed = length
            while (more := Prompts(tokenizer, task, needed, seed, list(essay), template).shortest(samples)) > needed:
                needed = more
            left_out.setdefault(task, {})[length] = needed
    if not plan:
        needed, task = min((n, task) for task, at in left_out.items() for n in at.values())
        raise UserError(f"no task fits {lengths[-1]} tokens: {task} needs {needed} with this tokenizer; give longer --lengths")
    scores = {task: {} for task in tasks if any(task == planned for planned, *_ in plan)}
    shown = [str(getattr(model, "path", "")), model.config.rope.to_dict(), str(model.tok_embeddings.weight.dtype)]
    bar = tqdm(total=len(plan) * samples, desc="ruler", unit="prompt", leave=False, disable=None if progress else True)
    for task, length, prompts in plan:
        bar.set_description(f"ruler, {task} at {length}")
        built = sorted((prompts.build(i)[:2] for i in range(samples)), key=lambda sample: len(sample[0]))
        rows, points = rows_at_once(model, length, generating=True), []
        for i in range(0, samples, rows):
            batch = [ids for ids, _ in built[i:i + rows]]
            key = [*shown, task, length, hashlib.sha256(repr(batch).encode()).hexdigest()]
            said = keep(key, lambda: answers_to(model, tokenizer, batch, prompts.new))
            points += [score(text, expected) for text, (_, expected) in zip(said, built[i:i + rows])]
            bar.update(len(batch))
        scores[task][length] = float(np.mean(points))
    bar.close()
    averages = {n: float(np.mean([s[n] for s in scores.values() if n in s])) for n in dict.fromkeys(n for _, n, _ in plan)}
    return result(model, seed, scores=scores, averages=averages, effective_length=effective_length(averages, threshold), threshold=threshold,
                  lengths=lengths, samples=samples, left_out=left_out, template=template, **notes, seconds=time.perf_counter() - started)


# ---------------------------------------------------------------------------------------------------------------------
# Command


@dataclass
class RulerConfig(Common):
    lengths: list[int] = field([], "tokens of prompt and answer together [one, two and four original windows]")
    tasks: list[str] = field(list(TASKS), "tasks to try", choices=list(TASKS), metavar="TASK")
    samples: int = field(20, "prompts for each task and length; RULER takes 500")
    text: list[str] = field([], "UTF-8 files that the essay haystack is made of, instead of the corpus")
    corpus: str = field("data/corpora/python", "token folder whose validation documents are the essay haystack where there is no --text")
    template: str = field("base", f"chat markup: {', '.join(TEMPLATES)}, or a text with {{task}} in it")
    threshold: float = field(85.6, "average, in percent, that the effective length needs")
    seed: int = field(42, "of keys, values and places")


def essay_words(config, tokenizer, longest):
    """What the essay haystack is made of: (words, description)."""
    if config.text:
        for path in config.text:
            if not Path(path).is_file() or read_text(path) is None:
                raise UserError(f"--text {path}: no such file, or not UTF-8 text")
        words = " ".join(map(read_text, config.text)).split()
        if not words:
            raise UserError("--text: there is no word in it")
        return words, f"{len(words):,} words of {', '.join(config.text)}"
    documents = validation_documents(ensure_corpus(config.corpus, tokenizer.path), 512, 2 * longest, tokenizer)
    words = " ".join(tokenizer.decode(document.tolist()) for document in documents).split()
    return words, f"{len(words):,} words of held-out documents of {config.corpus}"


def main(argv=None):
    config = parse(RulerConfig, __doc__, argv)
    model, tokenizer = load(config)
    lengths = config.lengths or [n * original_window(model.config) for n in (1, 2, 4)]
    essay, haystack = [], "no essays"
    if any(TASKS[task][1].get("haystack") == "essay" for task in config.tasks):
        essay, haystack = essay_words(config, tokenizer, max(lengths))
    note = "published RULER numbers have Paul Graham's essays as haystack and other words as keys: these do not compare with them"
    print(f"haystack   {haystack}\nnote       {note}")
    kept = Kept(config.out)
    measured = ruler(model, tokenizer, lengths, config.tasks, config.samples, essay, config.seed, config.template, config.threshold,
                     keep=store(kept, model, "ruler"), haystack=haystack, note=note)
    columns = list(measured["averages"])
    print("\n" + "task".ljust(18) + "".join(f"{n:>8}" for n in columns))
    for name, row in [*measured["scores"].items(), ("average", measured["averages"])]:
        print(name.ljust(18) + "".join(f"{row[n]:8.1f}" if n in row else "       -" for n in columns))
    for task, at in measured["left_out"].items():
        print(f"left out: {task} at " + ", ".join(f"{length} (needs {needed})" for length, needed in at.items()))
    print(f"effective length {measured['effective_length']} (average at least {config.threshold:g}, there and at every shorter length; "
          f"{config.samples} samples each, greedy; {measured['seconds']:.1f} s)")
    if config.out:
        write_json(config.out, measured)
        kept.done()
        print(f"wrote {config.out}")


if __name__ == "__main__":
    run(main)
