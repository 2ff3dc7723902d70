"""Is what stands far back found? Passkeys (five digits in noise) and needles (a sentence in text), by length of the prompt and by depth."""
import hashlib
import re
import time

import numpy as np
import torch
from tqdm import tqdm

from cli import UserError
from data.needle import NeedlePrompts
from data.passkey import PasskeyPrompts, random_key
from model import stream
from passes import in_turn, result, row_bytes, rows_at_once, store
from rope import depends_on_length


def judge(text, key, ended=False):
    """The verdict on a continuation: its first run of digits is the key. True or False; None while more text could still decide,
    which none can when it has ended."""
    found = re.search("[0-9]+", text)
    number = found.group() if found else ""
    if ended or found and found.end() < len(text):
        return number == key
    return None if key.startswith(number) else False  # no digit yet, or the number may go on


def judge_tokens(tokenizer, tokens, key, ended=False):
    """judge() on token ids, which EOS ends."""
    if tokenizer.eos_id in tokens:
        tokens, ended = tokens[:tokens.index(tokenizer.eos_id)], True
    return judge(tokenizer.decode(tokens), key, ended)


@torch.inference_mode()
def retrieve(model, tokenizer, prompts, answers, keys, generation=False):
    """Whether greedy decoding answers each prompt with its key: list of bool. Prompt and answer together have the same length in all rows.

    One teacher-forced pass decides: as long as the most probable tokens are the answer's, generation sees the same context, so it produces
    them. Where they differ, the digits so far nearly always rule the key out already; the rows that they leave open are generated. So are
    all rows if the frequencies depend on the length: the pass would see the first digit with those of the last.
    """
    verdicts = [None] * len(keys)
    if not generation and not depends_on_length(model.config.rope):
        for i, produced in enumerate(most_probable(model, prompts, answers)):
            same = next((n for n, (a, b) in enumerate(zip(produced, answers[i])) if a != b), len(answers[i]))
            verdicts[i] = judge_tokens(tokenizer, produced[:same + 1], keys[i])
    for length in sorted({len(p) for p, v in zip(prompts, verdicts) if v is None}):
        rows = [i for i, v in enumerate(verdicts) if v is None and len(prompts[i]) == length]
        prompt = torch.from_numpy(np.stack([prompts[i] for i in rows])).to(model.device)
        said = [[] for _ in rows]
        for new in stream(model, prompt, len(answers[rows[0]]) + 4, stop=(tokenizer.eos_id,)):
            for i, tokens, token in zip(rows, said, new.tolist()):
                tokens.append(token)
                verdicts[i] = judge_tokens(tokenizer, tokens, keys[i]) if verdicts[i] is None else verdicts[i]
            if all(verdicts[i] is not None for i in rows):  # every further token of a length-dependent method costs a pass over the whole text
                break
        for i, tokens in zip(rows, said):
            verdicts[i] = judge_tokens(tokenizer, tokens, keys[i], ended=True) if verdicts[i] is None else verdicts[i]
    return verdicts


def most_probable(model, prompts, answers):
    """What one pass over prompts and answers finds most probable at each token of the answer and at the one after it: lists of ids."""
    x = torch.from_numpy(np.stack([np.concatenate(pair) for pair in zip(prompts, answers)])).to(model.device)
    longest = max(map(len, answers))
    greedy = model(x, last=longest + 1).argmax(dim=-1).cpu()                                 # [B, longest + 1]
    return [row[longest - len(answer):].tolist() for row, answer in zip(greedy, answers)]


@torch.inference_mode()
def recall(model, prompts, answers):
    """Share of each answer's tokens that are the most probable ones after those before them, in one pass: a list of numbers from 0 to 1."""
    return [float(np.mean(np.equal(produced[:-1], answer))) for produced, answer in zip(most_probable(model, prompts, answers), answers)]


def grid(model, build, measure, lengths, depths, trials, seed, keep, name, progress=True, generating=False):
    """Measure `trials` prompts at every length and depth: what passkey and needle return beside their own numbers.

    build(rng, length, depth) -> (a tuple that describes one prompt, the distance of what is hidden from the prompt's end);
    measure(list of such tuples) -> a number a prompt, from 0 to 1.
    """
    lengths = sorted(set(lengths or [model.config.max_seq_len]))
    if depths < 1 or trials < 1:
        raise UserError(f"depths {depths}, trials {trials}: both have to be at least 1")
    if seed < 0:
        raise UserError(f"seed {seed}: give 0 or more")
    if lengths[0] < 1:
        raise UserError(f"a {name} prompt of {lengths[0]} tokens is too short: lengths are numbers of tokens")
    places, jobs, distances, started = [0.5] if depths == 1 else [i / (depths - 1) for i in range(depths)], {}, {}, time.perf_counter()
    for length in lengths:
        rng, size = np.random.default_rng((seed, length)), rows_at_once(model, length, generating)
        built = [build(rng, length, places[i // trials]) for i in range(depths * trials)]
        distances[length] = [round(float(np.mean([distance for _, distance in built[i:i + trials]]))) for i in range(0, len(built), trials)]
        for i in range(0, len(built), size):
            cases = [case for case, _ in built[i:i + size]]
            text = hashlib.sha256(b"".join(array.tobytes() for prompt, answer, *_ in cases for array in (prompt, answer))).hexdigest()
            jobs[length, i, text] = (cases,)
    found, keep = {length: [] for length in lengths}, store(keep, model, name)
    with tqdm(total=len(lengths) * depths * trials, desc=name, unit="prompt", leave=False, disable=None if progress else True) as bar:
        for (length, *_), numbers in zip(jobs, in_turn(measure, jobs, model, keep, size * row_bytes(model, lengths[-1], generating))):
            found[length] += numbers
            bar.update(len(numbers))
    by_depth = {n: np.reshape(v, (depths, trials)).mean(axis=1).tolist() for n, v in found.items()}
    return {"accuracy": {n: float(np.mean(a)) for n, a in by_depth.items()}, "lengths": lengths, "depths": places, "trials": trials,
            "accuracy_by_depth": by_depth, "distances": distances, "seconds": time.perf_counter() - started}


def passkey(model, tokenizer, lengths=None, depths=10, trials=10, seed=0, progress=True, generation=False, keep=None):
    """Accuracy of greedy passkey retrieval at each length (tokens, the answer counted) over `depths` places of the key, `trials` keys each.

    k_max is the PI paper's effective window at the longest length: the greatest distance k of the key from the end such that at every
    distance tried up to k at least 20 % of the trials succeed (0 if none does). keep: a cli.Kept. Returns the dict of the JSON file.
    """
    builder = PasskeyPrompts(tokenizer)

    def build(rng, length, depth):
        key = random_key(rng)
        prompt, answer = builder.build(key, length, depth=depth)
        return (prompt, answer, key), len(prompt) - builder.position(prompt, key)

    def measure(cases):
        return list(map(bool, retrieve(model, tokenizer, *zip(*cases), generation)))

    name = "passkey by generation" if generation else "passkey"
    found = grid(model, build, measure, lengths, depths, trials, seed, keep, name, progress, generating=True)  # some answers are generated
    longest = found["lengths"][-1]
    return result(model, seed, k_max=k_max(found["distances"][longest], found["accuracy_by_depth"][longest]), **found)


def needle(model, tokenizer, documents, lengths=None, depths=10, trials=10, seed=0, progress=True, keep=None):
    """A sentence hidden in text, begun again at the end: share of the tokens of its second half that the model finds most probable, each
    after the right ones before it. documents: the haystack, arrays of token ids with BOS in front. `floor` is the same share at each
    length where the sentence is hidden nowhere: what grammar alone tells. Methods that follow the length have the frequencies of the whole
    prompt throughout. keep: a cli.Kept. Returns the dict of the JSON file.
    """
    builder = NeedlePrompts(tokenizer, documents)

    def build(rng, length, depth):
        prompt, answer, place = builder.build(rng, length, depth)
        return (prompt, answer), len(prompt) - place

    def measure(cases):
        return recall(model, *zip(*cases))

    found = grid(model, build, measure, lengths, depths, trials, seed, keep, "needle", progress)
    floor = grid(model, lambda rng, length, _: build(rng, length, None), measure, found["lengths"], 1, trials, seed, keep, "floor", progress)
    return result(model, seed, floor=floor["accuracy"], **found)


def k_max(distances, accuracy, threshold=0.2):
    """The largest distance up to which every tried one has at least `threshold` accuracy; 0 if the nearest fails. (PI paper, 3.3)"""
    best = 0
    for distance, value in sorted(zip(distances, accuracy)):
        if value < threshold:
            break
        best = distance
    return best
