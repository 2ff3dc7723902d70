"""extras/long_window.py: the table of distance maps, and the finding that it is made for."""
import json

import pytest
import torch

import eval as evaluation
from common.errors import UserError
from eval import passkey, perplexity
from extras import long_window
from extras.long_window import seen_distances, table
from model import LLaMA, ModelConfig
from small_models import Countdown
from weights import load_model, load_tokenizer, save_model

L = 256


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    save_model(LLaMA(ModelConfig(dim=16, n_layers=1, n_heads=2, vocab_size=tokenizer.vocab_size,
                                 multiple_of=16, max_seq_len=L)), folder, tokenizer)
    return folder


@pytest.fixture
def command(base, tmp_path):
    text = tmp_path / "prose.txt"
    text.write_text("\n".join(f"Sentence {i} of the prose." for i in range(400)))

    def run(*flags):
        long_window.main(["--model", str(base), "--text", str(text), "--multiples", "1", "2",
                          "--max-tokens", "700", "--places", "2", "--seeds", "0", "1", "--out",
                          str(tmp_path / "r.json"), *flags])
        return json.loads((tmp_path / "r.json").read_text())
    return run


REROPE = '{"rope_type": "rerope", "temperature": "log_n"}'


def test_rows_are_what_eval_measures_at_the_factor_of_the_length(command, base, tokenizer,
                                                                 tmp_path):
    result = command("--methods", "default", REROPE, "yarn")
    assert [row["method"] for row in result["long_window"]] == ["default", REROPE, "yarn"]
    ids = torch.tensor(tokenizer.encode((tmp_path / "prose.txt").read_text(), bos=True)).numpy()
    for row in result["long_window"]:
        rope = {"factor": 2.0} | long_window.parse_rope_flag(row["method"])
        if rope["rope_type"] == "default":
            rope["factor"] = 1.0
        model = load_model(base, rope=rope)
        expected = perplexity(model, [ids[:701]], 512, progress=False)["perplexity"]
        assert row["perplexity"]["512"] == pytest.approx(expected, rel=1e-6)
        assert set(row["passkey"]) == {"256", "512"}
    _, header, body = table(result)
    assert header == ["method", "256", "512"] and len(body) == 3
    for name in ("r.png", "r-maps.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "r.json.partial").exists()


def test_what_is_measured_is_kept(command, monkeypatch, tmp_path):
    retrieve = evaluation.retrieve_passkeys

    def counting(calls=10**6):
        counted = Countdown(retrieve, calls)
        monkeypatch.setattr(evaluation, "retrieve_passkeys", counted)
        return counted
    everything = counting()
    whole = command("--methods", "default", "rerope")
    broken = counting(calls=5)
    with pytest.raises(KeyboardInterrupt):
        command("--methods", "default", "rerope")
    rest = counting()
    resumed = command("--methods", "default", "rerope")
    assert resumed["long_window"] == whole["long_window"]
    assert broken.made + rest.made == everything.made


def test_the_picture_of_a_map_has_every_distance():
    found = seen_distances(64, 4.0)
    assert list(found) == long_window.MAPS
    assert found["rerope"] == [min(d, 32) for d in range(256)]
    assert found["streaming"][:60] == list(range(60))
    assert found["streaming"][60:252] == [None] * 192
    assert found["streaming"][252:] == [60, 61, 62, 63]


@pytest.mark.parametrize("flags, words", [
    (["--rope", "yarn"], "tries methods itself"),
    (["--seed", "1"], "give --seeds"),
    (["--seeds", "-1"], "--seeds one or more numbers of at least 0"),
    (["--multiples", "0"], "--multiples have to be at least 1"),
    (["--multiples", "4"], "--max-tokens 700 is below the longest length, 1024"),
    (["--methods", '{"rope_type": "yarn", "factor": 2}'], "leave the factor out"),
    (["--methods", "yarn", "nosuch"], "nosuch"),
    (["--methods", "yarn", '{"rope_type": "rerope", "window": 300}'], "distance of 300"),
    (["--methods", "rerope", "--attention", "sdpa", "--device", "cpu"], "choose auto or tiled"),
    (["--out", ""], "--out: give the name")])
def test_wrong_input(command, flags, words):
    with pytest.raises(UserError, match=words):
        command(*flags)


def test_a_broken_model_is_no_row(command, base, tmp_path, tokenizer):
    model = load_model(base)
    torch.nn.init.constant_(model.output.weight, 3e38)              # finite, but no product with it
    (tmp_path / "broken").mkdir()
    torch.save(model.state_dict(), tmp_path / "broken" / "consolidated.00.pth")
    for name in ("params.json", "tokenizer.model"):
        (tmp_path / "broken" / name).write_bytes((base / name).read_bytes())
    with pytest.raises(UserError, match="the loss is not a number"):
        command("--methods", "default", "--model", str(tmp_path / "broken"))
    assert not (tmp_path / "r.json").exists()


def test_a_seed_counts_once(command):
    """The same keys twice are no more keys."""
    assert command("--methods", "default", "--seeds", "1", "0", "1")["seeds"] == [1, 0]


def test_folded_distances_find_keys_far_beyond_the_window_and_only_with_a_temperature():
    """The trained tiny model, at eight times its window."""
    found = {}
    for temperature in ("none", "log_n"):
        rope = {"rope_type": "rerope", "factor": 8, "temperature": temperature}
        model = load_model("data/tiny", rope=rope)
        tokenizer = load_tokenizer("data/tiny", model.config.vocab_size)
        found[temperature] = passkey(model, tokenizer, [2048], 5, 1, progress=False)["accuracy"]
    assert found["log_n"][2048] >= 0.8
    assert found["none"][2048] <= 0.4
