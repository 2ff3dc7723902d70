"""docs/playground.html in a real browser: it computes what PyTorch does, and nothing breaks it."""
import base64
import shutil
from pathlib import Path
from urllib.parse import urlencode

import numpy as np
import pytest
import torch

from data.passkey import PasskeyPrompts
from eval import perplexity
from extras.playground import (PAGE_FACTORS, SAMPLES, open_browser, open_page, page,
                               page_methods, set_screen, wait_for)
from methods import METHODS
from methods.temperatures import TEMPERATURES
from model import generate
from rope import yarn_mscale
from weights import load_model, load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "playground.html"
MAPS = [name for name, method in METHODS.items() if method.distance_map is not None]


def half_model(rope=None):
    """The tiny model with the page's weights, which went through float16."""
    return load_model(ROOT / "data" / "tiny", rope=rope).half().float()


@pytest.fixture(scope="module")
def tiny_tokenizer():
    return load_tokenizer(ROOT / "data" / "tiny")


def test_the_committed_page_is_what_the_command_makes(tiny_tokenizer):
    made = page(load_model(ROOT / "data" / "tiny"), tiny_tokenizer)
    assert PAGE.read_text(encoding="utf-8") == made, "python extras/playground.py makes it anew"


def test_the_page_needs_no_other_file_and_stays_small():
    text = PAGE.read_text(encoding="utf-8")
    assert PAGE.stat().st_size < 4e6
    assert "{{" not in text.split('id="tables"')[0]
    for word in ("src=", "@import", "url(", "fetch(", "XMLHttpRequest", "importScripts"):
        assert word not in text, word


def test_every_method_that_can_be_on_the_page_is():
    offered = (ROOT / "docs" / "playground" / "page.html").read_text(encoding="utf-8")
    for name in [*page_methods(), *MAPS, *TEMPERATURES]:
        assert f'<option value="{name}"' in offered, name
    assert set(page_methods()) >= {"default", "linear", "ntk", "ntk_by_parts", "yarn", "llama3",
                                   "dprope"}


@pytest.mark.parametrize("path", [*SAMPLES, "rope.py"])
def test_half_precision_changes_little(tiny_tokenizer, path):
    """What the page says at its end."""
    text = (ROOT / path).read_text(encoding="utf-8")
    ids = torch.tensor([tiny_tokenizer.encode(text, bos=True)])
    with torch.inference_mode():
        exact = load_model(ROOT / "data" / "tiny")(ids[:, :256])
        half = half_model()(ids[:, :256])
    assert 0 < (exact - half).abs().max() < 0.03
    nll = [torch.nn.functional.cross_entropy(x[0], ids[0, 1:257]) for x in (exact, half)]
    assert abs(nll[0] - nll[1]) < 2e-4


# ---- In a browser --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    pytest.importorskip("selenium")
    if not any(map(shutil.which, ("chromium", "google-chrome", "chrome"))):
        pytest.skip("no Chromium: apt-get install chromium chromium-driver")
    with open_browser() as driver:
        yield driver


@pytest.fixture
def loaded(browser):
    """The browser, with the page and a short text in it; nothing may have gone wrong there."""
    browser.get_log("browser")
    if not browser.current_url.startswith(PAGE.as_uri()):
        browser.get(PAGE.as_uri())
    follow(browser, "tokens=64")
    yield browser
    assert [entry["message"] for entry in browser.get_log("browser")] == []


DONE = "show('status').textContent.startsWith('read in')"


def follow(driver, settings):
    """Go to a link on the page that is open."""
    driver.execute_script("""
        history.replaceState(null, "", "#" + arguments[0]);
        arrive();
        """, settings if isinstance(settings, str) else urlencode(settings))


def read(driver, settings):
    """The same, and wait until the model has read its texts."""
    follow(driver, settings)
    wait_for(driver, DONE)


def text_of(driver, name):
    return driver.execute_script("return show(arguments[0]).textContent", name)


def page_logits(driver, tokens, rope_type, factor, temperature, w="", g=""):
    """Logits of the page's own model, [T, V]."""
    encoded = driver.execute_script("""
        const [tokens, method, factor, temperature, w, g] = arguments;
        control("w").value = w;
        control("g").value = g;
        const model = new LLaMA(weights, tables.config);
        const { states } = model.hidden(tokens, ropeOf(method, factor, temperature), []);
        const bytes = new Uint8Array(model.logits(states).buffer);
        let text = "";
        for (let i = 0; i < bytes.length; i += 4096)
            text += String.fromCharCode(...bytes.subarray(i, i + 4096));
        return btoa(text);
        """, tokens, rope_type, factor, temperature, w, g)
    return np.frombuffer(base64.b64decode(encoded), "<f4").reshape(len(tokens), -1)


CASES = [*[(name, 2, "own", {}) for name in page_methods()],
         ("yarn", 8, "log_n", {}), ("default", 1, "llama4", {}), ("linear", 1.5, "none", {}),
         *[(name, 4, "log_n", {}) for name in MAPS],
         ("rerope", 2, "own", {"window": 50}),
         ("leaky_rerope", 2, "own", {"window": 30, "stretch": 2.5}),
         ("self_extend", 2, "own", {"window": 33, "group": 4}),
         ("dca", 2, "own", {"chunk": 100, "local": 30}),
         ("streaming", 2, "own", {"sinks": 2, "window": 77})]


@pytest.mark.slow
@pytest.mark.parametrize("name, factor, temperature, settings", CASES)
def test_logits_are_those_of_pytorch(loaded, tiny_tokenizer, name, factor, temperature, settings):
    text = (ROOT / "common" / "cli.py").read_text(encoding="utf-8")
    tokens = tiny_tokenizer.encode(text, bos=True)[:272]
    rope = {"rope_type": name, "factor": factor, "original_max_position_embeddings": 256}
    rope |= settings
    if temperature != "own":
        rope["temperature"] = temperature
    with torch.inference_mode():
        expected = half_model(rope)(torch.tensor([tokens]))[0].numpy()
    given = page_logits(loaded, tokens, name, factor, temperature, *map(str, settings.values()))
    assert np.abs(given - expected).max() < 2e-4
    if (name, temperature) != ("default", "own"):
        with torch.inference_mode():
            plain = half_model()(torch.tensor([tokens]))[0].numpy()
        assert np.abs(plain - expected).max() > 0.1        # or the method would not have been tried


def test_factors_of_the_page_are_those_of_its_table(loaded):
    assert loaded.execute_script("return tables.factors") == list(PAGE_FACTORS)
    assert loaded.execute_script("return tables.methods.linear[6].frequencies[0]") == 1 / 8


def test_token_ids_are_those_of_sentencepiece(loaded, tiny_tokenizer):
    rng = np.random.default_rng(0)
    alphabet = list("abcdefgh   \n\t()=:_.,0123é∆😀▁{}<>")
    texts = ["", " ", "   ", "a", "def f(x):\n    return x ** 2\n", "▁", "a▁b", "😀 é \u0301",
             "<0x0A> </s> <s>", "\r\n\x00", "x" * 300, "    " * 50, "▁▁ ▁ a ▁", "a  ▁ ",
             *("".join(rng.choice(alphabet, 80)) for _ in range(100)),
             (ROOT / "rope.py").read_text(encoding="utf-8")]
    given = loaded.execute_script("return arguments[0].map(text => tokenizer.encode(text))", texts)
    assert given == [tiny_tokenizer.encode(text) for text in texts]
    back = loaded.execute_script("return arguments[0].map(ids => tokenizer.decode(ids))", given)
    assert back == texts


def test_passkey_prompts_are_those_of_python(loaded, tiny_tokenizer):
    prompts = PasskeyPrompts(tiny_tokenizer)
    for key, length, depth in [("31415", 256, 0.2), ("00007", 512, 0.0), ("98765", 73, 1.0),
                               ("4711", 256, 0.25), ("4711", 256, 0.75)]:
        given = loaded.execute_script("""
            const [key, length, depth] = arguments;
            const made = new PasskeyPrompts(tokenizer, tables.passkey).build(key, length, depth);
            return [made.prompt, made.place];
            """, key, length, depth)
        prompt, _ = prompts.build(key, length, depth)
        assert given == [prompt.tolist(), prompts.position(prompt, key)]


def losses_and_answer(tokenizer, rope, length, key="31415", depth=0.2):
    """What the page should show: the mean loss within L and beyond, and what the model writes."""
    model = half_model(rope)
    ids = tokenizer.encode((ROOT / "common" / "files.py").read_text(encoding="utf-8"), bos=True)
    found = perplexity(model, [np.array(ids[:length + 1])], length, bins=length // 256)
    prompt, _ = PasskeyPrompts(tokenizer).build(key, length, depth)
    answer = generate(model, torch.from_numpy(prompt)[None], 8)[0, len(prompt):].tolist()
    means = found.get("nll_by_context", [found["nll"]])
    return means[0], float(np.mean(means[1:] or [0])), tokenizer.decode(answer)


@pytest.mark.slow
@pytest.mark.parametrize("step, method, length, found", [
    (1, "default", 256, True), (2, "default", 512, False), (3, "linear", 512, False),
    (4, "yarn", 512, True)])
def test_the_walk_shows_what_it_says(loaded, tiny_tokenizer, step, method, length, found):
    """Losses, verdict and digits of its steps are PyTorch's, and support its words."""
    follow(loaded, "")
    for n in range(1, step):
        loaded.execute_script("show('next').click()")
        wait_for(loaded, f"show('step-now').textContent === 'Step {n + 1} of 7'")
    assert text_of(loaded, "step-now") == f"Step {step} of 7"
    wait_for(loaded, DONE)
    rope = {"rope_type": method, "factor": 2, "original_max_position_embeddings": 256}
    inside, beyond, answer = losses_and_answer(tiny_tokenizer, rope, length)
    words = text_of(loaded, "losses-words")
    assert f"{inside:.2f} nats a token" in words
    assert (f"{beyond:.2f} beyond it" in words) == (length > 256)
    written = loaded.execute_script("return reading.passkey.written")
    assert answer.startswith(written)
    assert text_of(loaded, "verdict").startswith("Found" if found else "Lost")
    assert ("31415" in written) == found


def test_far_beyond_the_window_the_last_steps_hold(tiny_tokenizer):
    """Steps 5 to 7, 2,048 tokens, in PyTorch: YaRN and ReRoPE keep the loss and lose the key; with
    log n it is found. And what is said of YaRN beside that."""
    folded = {"rope_type": "rerope", "factor": 8, "original_max_position_embeddings": 256}
    yarn = {**folded, "rope_type": "yarn"}
    for rope, found in [(yarn, False), (folded, False), ({**folded, "temperature": "log_n"}, True)]:
        inside, beyond, answer = losses_and_answer(tiny_tokenizer, rope, 2048)
        assert beyond < inside + 0.25
        assert ("31415" in answer) == found
    assert losses_and_answer(tiny_tokenizer, yarn, 2048)[2].lstrip().startswith("3141")
    assert "31415" not in losses_and_answer(tiny_tokenizer, yarn, 256)[2]
    gentle = {**yarn, "factor": 2, "temperature": "none"}
    unsharpened = losses_and_answer(tiny_tokenizer, gentle, 512)
    assert "3141" in unsharpened[2] and "31415" not in unsharpened[2]
    assert round(yarn_mscale(2) ** 2, 2) == 1.14


def test_the_last_token_looks_at_the_key_where_it_is_found(loaded):
    """The head that the page shows at first is the one that finds the key."""
    read(loaded, "method=yarn&tokens=512")
    assert "73 % on the key's sentence" in text_of(loaded, "attention-words")
    read(loaded, "method=yarn&factor=8")                 # step 5: not dilution, but blur
    assert "100 % on the key's sentence. Strongest: \"1\"" in text_of(loaded, "attention-words")
    assert text_of(loaded, "verdict").startswith("Lost")
    read(loaded, "method=linear&tokens=512")
    assert "3 % on the key's sentence" in text_of(loaded, "attention-words")


def test_angles_and_distances_are_counted(loaded):
    for settings, dials, distances in [
            ("tokens=512", "19 of 32 pairs meet angles", "511 → 511."),
            ("tokens=512&method=linear", "No pair meets angles", "511 → 255.5."),
            ("tokens=512&method=rerope", "a distance of 128.", "511 → 128."),
            ("tokens=512&method=streaming", "a distance of 255.", "511 → 255."),
            ("tokens=512&method=self_extend&w=100&g=2", "a distance of 305.", "511 → 305.")]:
        follow(loaded, settings)
        assert dials in text_of(loaded, "dials-words"), settings
        assert distances in text_of(loaded, "distances-words"), settings


# ---- What a user may do --------------------------------------------------------------------------


@pytest.mark.parametrize("settings, line", [
    ({"text": "own", "own": ""}, "The text is empty: type one, or choose a sample."),
    ({"text": "own", "own": " \n "}, "The text is empty: type one, or choose a sample."),
    ({"factor": "0"}, "The link says factor = “0”, which cannot be chosen; it stays 2."),
    ({"tokens": "1e9"}, "The link says tokens = “1e9”, which cannot be chosen"),
    ({"method": "<img src=x onerror=alert(1)>"}, "The link says method = “<img src=x onerror"),
    ("method=", "The link says method = “”, which cannot be chosen; it stays default."),
    ("text", "The link says text = “”, which cannot be chosen"),
    ("temperature=&layer=", "The link says layer = “”, which cannot be chosen; it stays 2."),
    ("key=%FF%F", "The passkey: give one to nine digits."),
    ({"item": "1"}, "The link has a setting “item”, which this page does not have."),
    ({"key": ""}, "The passkey: give one to nine digits."),
    ({"key": "😀"}, "The passkey: give one to nine digits."),
    ({"key": "1" * 40}, "The passkey: give one to nine digits."),
    ({"method": "rerope", "w": "0"}, "window: give a whole number from 1 to 2048, or nothing."),
    ({"method": "self_extend", "g": "1.5"}, "group: give a whole number from 1 to 2048"),
    ({"method": "leaky_rerope", "g": "0.5"}, "stretch: give a number from 1 to 2048"),
    ({"method": "dca", "w": "10", "g": "9"}, "local: at most half of the chunk."),
])
def test_what_cannot_be_is_one_line(loaded, settings, line):
    follow(loaded, settings)
    assert line in text_of(loaded, "problem")


def test_odd_texts_are_read(loaded):
    """An emoji, one letter, a text shorter than asked for, a key longer than the prompt."""
    read(loaded, {"text": "own", "own": "😀 x = 1", "tokens": 64})
    assert text_of(loaded, "problem") == ""
    assert "The text has only 8 tokens." in text_of(loaded, "losses-words")
    assert "has at least 73 tokens: choose a longer text." in text_of(loaded, "verdict")
    read(loaded, {"text": "own", "own": "a", "key": "123456789"})
    assert "NaN" not in loaded.execute_script("return show('results').innerHTML")


def test_captions_tell_what_was_read_not_what_is_chosen_now(loaded):
    read(loaded, "method=yarn&tokens=128")
    stale = """
        control("method").value = "linear";
        control("method").dispatchEvent(new Event("input", { bubbles: true }));
        return [...document.querySelectorAll("#results section.stale")].length"""
    assert loaded.execute_script(stale) == 4             # at once, before the texts are read anew
    assert text_of(loaded, "losses-words").startswith("YaRN")
    wait_for(loaded, "reading && " + DONE)
    assert text_of(loaded, "losses-words").startswith("Position Interpolation")
    assert loaded.execute_script("return document.querySelectorAll('section.stale').length") == 0
    follow(loaded, "method=yarn&tokens=512")
    assert loaded.execute_script("return reading.passkey") is None
    wait_for(loaded, "reading.text")
    assert loaded.execute_script("""
        const stale = show("verdict").closest("section").classList.contains("stale");
        return stale !== Boolean(reading.passkey)""")


def test_the_curve_of_plain_rope_is_that_of_this_text(loaded, tiny_tokenizer):
    for settings, path, length in [("tokens=128", "common/files.py", 128),
                                   ("tokens=192", "common/files.py", 192),
                                   ("tokens=192&text=common/cli.py", "common/cli.py", 192),
                                   ("tokens=128", "common/files.py", 128)]:
        read(loaded, "method=yarn&" + settings)
        ids = tiny_tokenizer.encode((ROOT / path).read_text(encoding="utf-8"), bos=True)
        found = perplexity(half_model(), [np.array(ids[:length + 1])], length)
        plain = loaded.execute_script("return mean(reading.plain)")
        assert plain == pytest.approx(found["nll"], abs=1e-4)


def test_drawings_follow_the_size_of_the_window(loaded):
    read(loaded, "tokens=128")
    wide = loaded.execute_script("return show('losses').getAttribute('viewBox')")
    set_screen(loaded, 700, 900)
    try:
        wait_for(loaded, f"show('losses').getAttribute('viewBox') !== '{wide}'")
    finally:
        set_screen(loaded, 1360, 1240)


def test_a_map_does_not_get_the_settings_of_another(loaded):
    follow(loaded, "method=rerope&w=100")
    loaded.execute_script("""
        control("method").value = "streaming";
        control("method").dispatchEvent(new Event("input", { bubbles: true }));""")
    assert loaded.execute_script("return mapSettings('streaming')") == {}


def test_a_text_of_ones_own_survives_the_walk(loaded):
    follow(loaded, {"text": "own", "own": "x = 1\n"})
    loaded.execute_script("control('own').value = 'y = 2 # ' + 'long '.repeat(1000)")
    loaded.execute_script("settingsChanged(); toWrite = setTimeout(writeLink, 0)")
    assert "too long for the address" in text_of(loaded, "problem")
    loaded.execute_script("show('return').click()")
    wait_for(loaded, "value('text') !== 'own'")
    assert loaded.execute_script("return value('own')").startswith("y = 2 # long")


def test_what_was_drawn_for_other_settings_does_not_stay(loaded):
    read(loaded, "tokens=256")
    assert text_of(loaded, "attention-words")
    read(loaded, "tokens=64")
    assert "at least 73 tokens" in text_of(loaded, "verdict")
    assert text_of(loaded, "attention-words") == ""


def test_controls_follow_the_keyboard(loaded):
    """Those beside the views, too, which stand outside the form."""
    read(loaded, "tokens=128")
    before = text_of(loaded, "attention-words")
    loaded.find_element("name", "pair").send_keys("\ue012")                   # the left arrow
    assert text_of(loaded, "pair-now") == "30" and "pair 30 sees" in text_of(loaded,
                                                                             "distances-words")
    loaded.find_element("name", "layer").send_keys("0")
    assert text_of(loaded, "attention-words") != before
    wait_for(loaded, "location.hash.includes('layer=0') && location.hash.includes('pair=30')")
    loaded.find_element("name", "tokens").send_keys("\ue014")                 # the right arrow
    wait_for(loaded, "location.hash.includes('tokens=192')")
    assert text_of(loaded, "tokens-now") == "192"


def test_a_factor_that_changes_nothing_cannot_be_chosen(loaded):
    for settings, disabled in [("", True), ("method=yarn", False), ("method=abf", True),
                               ("method=rerope", True), ("method=self_extend", False),
                               ("method=self_extend&g=4", True)]:
        follow(loaded, settings)
        assert loaded.execute_script("return control('factor').disabled") == disabled, settings


def test_the_walk_is_left_and_found_again(loaded):
    follow(loaded, "method=linear&tokens=512&pair=0")
    assert text_of(loaded, "step-now") == "Step 3 of 7"
    follow(loaded, "method=linear&tokens=512&pair=7&layer=1")           # only looked at otherwise
    assert text_of(loaded, "step-now") == "Step 3 of 7"
    follow(loaded, "method=linear&tokens=576")
    assert text_of(loaded, "step-now") == "Step 3 of 7 has other settings"
    assert loaded.execute_script("return show('walk').className") == "left"
    loaded.execute_script("show('return').click()")
    wait_for(loaded, "value('tokens') === '512'")
    assert loaded.execute_script("return show('walk').className") == ""


def test_a_link_carries_the_settings(loaded):
    """What is chosen by hand stands in the address, and the address brings it back."""
    loaded.execute_script("""
        const choose = (name, chosen) => {
          control(name).value = chosen;
          control(name).dispatchEvent(new Event("input", { bubbles: true }));
        };
        for (const [name, chosen] of arguments[0]) choose(name, chosen);
        """, [["method", "self_extend"], ["w", "60"], ["g", "3"], ["tokens", "320"],
              ["text", "own"], ["own", "x = 1\ny = '&#'\n"], ["key", "4711"], ["layer", "1"],
              ["pair", "7"]])
    wait_for(loaded, "location.hash.includes('own=') && location.hash.includes('pair=7')")
    address = loaded.current_url
    names = ["method", "w", "g", "tokens", "text", "own", "key", "layer", "pair", "depth"]
    values = "return arguments[0].map(name => value(name))"
    chosen = loaded.execute_script(values, names)
    open_page(loaded, PAGE, address.partition("#")[2])
    assert loaded.execute_script(values, names) == chosen
    assert chosen[:3] == ["self_extend", "60", "3"] and chosen[5] == "x = 1\ny = '&#'\n"
    assert text_of(loaded, "problem") == ""


def test_the_page_answers_while_the_model_reads(loaded):
    """Settings may be changed in the middle: the work for the old ones ends, and no view of it
    comes late."""
    loaded.execute_script("location.hash = 'tokens=1024&method=yarn&factor=4'")
    wait_for(loaded, "!show('progress').hidden")
    loaded.execute_script("location.hash = 'tokens=64&method=ntk'")
    wait_for(loaded, "value('tokens') === '64' && " + DONE)
    assert text_of(loaded, "losses-words").startswith("NTK-aware × 2")
    assert loaded.execute_script("return reading.text.nll.length") == 64


def test_curves_can_be_kept_and_removed(loaded):
    read(loaded, "")
    loaded.execute_script("show('keep').click(); show('next').click()")
    loaded.execute_script("show('forget').click(); show('keep').click()")   # nothing is read yet
    wait_for(loaded, "reading.text && reading.text.nll.length === 512")
    curves = "return [...document.querySelectorAll('#losses polyline')].map(c => c.classList[0])"
    assert "kept" not in loaded.execute_script(curves)
    loaded.execute_script("show('keep').click()")
    assert text_of(loaded, "kept-name") == "plain RoPE, 512 tokens"
    read(loaded, "tokens=128&method=linear")
    assert "kept" in loaded.execute_script(curves)
    ends = """
        const ends = name => [...document.querySelector(`#losses .${name}`).points].at(-1).x;
        return ends("kept") === ends("curve")"""
    assert loaded.execute_script(ends)                   # a longer one is cut
    loaded.execute_script("show('forget').click()")
    assert "kept" not in loaded.execute_script(curves)


def test_every_control_has_a_label_and_every_drawing_words(loaded):
    read(loaded, "tokens=128")
    unlabelled = loaded.execute_script("""
        return [...form.elements].filter(one => one.name && one.labels.length === 0)
                                 .map(one => one.name)""")
    assert unlabelled == []
    for name in ("losses", "attention", "dials", "distances"):
        words = loaded.execute_script(
            "return show(show(arguments[0]).getAttribute('aria-describedby')).textContent", name)
        assert len(words) > 20


@pytest.mark.parametrize("width, height, dark", [(1360, 900, False), (390, 844, True)])
def test_nothing_is_wider_than_the_screen(loaded, width, height, dark):
    set_screen(loaded, width, height, dark)
    try:
        read(loaded, "method=dca&tokens=256")
        assert loaded.execute_script("return document.documentElement.scrollWidth") <= width
        paper = loaded.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert paper == ("rgb(18, 22, 28)" if dark else "rgb(255, 255, 255)")
        assert loaded.execute_script("return show('losses').clientWidth") > 250
    finally:
        set_screen(loaded, 1360, 1240)
