"""Exported .gguf files against llama.cpp itself, which the package xllamacpp brings: it computes
the same probabilities, and cuts texts into the same tokens."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("xllamacpp")  # CI installs it: requirements-extra.txt
tokenizers = pytest.importorskip("tokenizers")

from test_gguf import PRE, SIZE, make, train
from test_sentencepiece_json import MODELS, train_sentencepiece

from data.sentencepiece_json import CHECK_TEXTS
from weights import load_config, load_model, load_tokenizer, save_model
from weights.__main__ import main

ROOT = Path(__file__).resolve().parent.parent
L = 256  # of data/tiny
BELOW, ABOVE = [40, 200], [300, 500, 1000]  # tokens, of L
# In a process of its own: it has threads, and what it cannot load it may end with.
LLAMA_CPP = """if True:
    import json, sys, xllamacpp
    path, windows = json.load(sys.stdin)
    request = {"n_predict": 1, "n_probs": 20, "temperature": 0, "cache_prompt": False}
    answers = []
    for window, prompts in windows:
        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx = path, window
        params.n_parallel, params.n_gpu_layers, params.port = 1, 0, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.warmup = params.fit_params = False
        server = xllamacpp.Server(params)
        answers += [server.handle_completions({"prompt": prompt} | request) for prompt in prompts]
    print(json.dumps(answers))
"""


def ask(path, *windows):
    """windows: (tokens, prompts) each. Returns [(tokens of the prompt, {id: log-probability} of the
    20 likeliest next tokens)] of all prompts."""
    done = subprocess.run([sys.executable, "-c", LLAMA_CPP], capture_output=True, text=True,
                          input=json.dumps([str(path), windows]), timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    found = []
    for answer in json.loads(done.stdout.splitlines()[-1]):
        assert "choices" in answer, answer
        probabilities = answer["choices"][0]["logprobs"]
        first = probabilities["content"][0]["top_logprobs"] if probabilities else []
        found.append((answer["usage"]["prompt_tokens"],
                      {token["id"]: token["logprob"] for token in first}))
    return found


@torch.no_grad()
def log_probabilities(model, ids):
    """Of all tokens after these ids."""
    return model(torch.tensor([ids]))[0, -1].log_softmax(-1)


def largest_difference(ours, theirs):
    return max(abs(logprob - float(ours[i])) for i, logprob in theirs.items())


@pytest.fixture(scope="module")
def ids():
    text = (ROOT / "eval.py").read_text(encoding="utf-8")
    found = load_tokenizer(ROOT / "data/tiny").encode(text, bos=True)
    assert len(found) > 1000
    return found


@pytest.fixture(scope="module")
def plain(ids):
    """{length: log-probabilities of plain RoPE after so many ids}"""
    model = load_model(ROOT / "data/tiny")
    return {length: log_probabilities(model, ids[:length]) for length in BELOW + ABOVE}


SHORT = [1 + i / 50 for i in range(32)]
LONG = [1 + i / 10 for i in range(32)]
ROPES = {
    "linear": {"factor": 4},
    "ntk": {"factor": 4},
    "ntk_by_parts": {"factor": 4},
    "yarn": {"factor": 4},
    "yarn, temperature": {"factor": 4, "attention_factor": 0.8},
    "yarn, DeepSeek's temperature": {"factor": 4, "mscale": 1.0, "mscale_all_dim": 0.5},
    "yarn, betas": {"factor": 4, "beta_fast": 8, "beta_slow": 2},  # llama.cpp ignores its keys
    "yarn, turns": {"factor": 4, "ramp": "turns"},
    "yarn, resonance": {"factor": 4, "resonance": True},
    "llama3": {"factor": 4},
    "dprope": {"factor": 4},
    "abf": {"factor": 4, "new_rope_theta": 300000},
    "longrope": {"factor": 4, "short_factor": SHORT, "long_factor": LONG},
    "longrope, temperature": {"factor": 4, "short_factor": SHORT, "long_factor": LONG,
                              "attention_factor": 0.8},
}


@pytest.mark.parametrize("name", ROPES)
def test_positions(tmp_path, ids, plain, name):
    """Below L and above. The comparison would notice another method: plain RoPE is far off."""
    rope = {"rope_type": name.split(",")[0]} | ROPES[name]
    path = tmp_path / "m.gguf"
    main(["export", "--model", str(ROOT / "data/tiny"), "--to", "gguf", "--out", str(path),
          "--rope", json.dumps(rope)])
    model = load_model(ROOT / "data/tiny", rope)
    found = ask(path, (L, [ids[:n] for n in BELOW]), (4 * L, [ids[:n] for n in ABOVE]))
    for length, (tokens, theirs) in zip(BELOW + ABOVE, found, strict=True):
        assert tokens == length and len(theirs) == 20
        difference = largest_difference(log_probabilities(model, ids[:length]), theirs)
        assert difference < 0.02, f"{name} at {length} tokens: {difference}"
        assert largest_difference(plain[length], theirs) > 0.15


@pytest.mark.parametrize("dtype, bits, most", [
    ("float32", 32, 0.01), ("float16", 16, 0.02), ("bfloat16", 16, 0.05), ("q8_0", 8.5, 0.15)])
def test_types(tmp_path, ids, dtype, bits, most):
    """The file has so many bits a weight; with Q8_0 llama.cpp rounds the activations, too."""
    path = tmp_path / "m.gguf"
    main(["export", "--model", str(ROOT / "data/tiny"), "--to", "gguf", "--out", str(path),
          "--dtype", dtype])
    model = load_model(path)
    weights = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    assert 0 < path.stat().st_size - weights * bits / 8 < 50000, "the rest is the tokenizer"
    for tokens, theirs in ask(path, (L, [ids[:40], ids[:200]])):
        assert largest_difference(log_probabilities(model, ids[:tokens]), theirs) < most


def check_texts(path, add_bos):
    """llama.cpp makes our ids of each text: as many, and with the same next token."""
    model, tokenizer = load_model(path), load_tokenizer(path, load_config(path).vocab_size)
    texts = [text for text in CHECK_TEXTS if text]
    compared = 0
    for text, (tokens, theirs) in zip(texts, ask(path, (512, texts))):
        ids = tokenizer.encode(text, bos=add_bos)
        assert tokens == len(ids), text
        if theirs:  # none where the next token is half a character
            assert largest_difference(log_probabilities(model, ids), theirs) < 0.02, text
            compared += 1
    assert compared > 10


@pytest.mark.parametrize("kind", ["tiny", *MODELS])
def test_sentencepiece(tmp_path, kind):
    """Our tiny tokenizer and others; rows of the embedding beyond the last token are filled."""
    tokenizer = ROOT / "data/tiny/tokenizer.model"
    if kind != "tiny":
        tokenizer = train_sentencepiece(tmp_path / "tokenizer.model", kind)
    tokenizer = load_tokenizer(tokenizer)
    model = make(vocab_size=tokenizer.vocab_size + 8, max_seq_len=512)
    save_model(model, tmp_path / "meta", tokenizer)
    path = tmp_path / "m.gguf"
    main(["export", "--model", str(tmp_path / "meta"), "--to", "gguf", "--out", str(path)])
    assert load_tokenizer(path).vocab_size == tokenizer.vocab_size
    check_texts(path, True)


@pytest.mark.parametrize("pre", PRE)
def test_byte_level(tmp_path, pre):
    """The way of splitting is found by what it does. One of them asks for BOS, as LLaMA 3's does.
    """
    trained, add_bos = train(pre), pre == "llama-bpe"
    if add_bos:
        trained.post_processor = tokenizers.processors.TemplateProcessing(
            single="<|im_start|> $A", pair=None, special_tokens=[("<|im_start|>", 1)])
    trained.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(
        {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}))
    save_model(make(vocab_size=SIZE, max_seq_len=512), tmp_path / "meta", load_tokenizer(tmp_path))
    path = tmp_path / "m.gguf"
    main(["export", "--model", str(tmp_path / "meta"), "--to", "gguf", "--out", str(path)])
    check_texts(path, add_bos)
