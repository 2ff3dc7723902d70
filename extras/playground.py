"""docs/playground.html: the tiny model on a page that a browser opens from disk.

    python extras/playground.py
    python extras/playground.py --picture docs/figures/playground.png    # what README shows

The page is put together from docs/playground/ (HTML, CSS and JavaScript), from the weights of
data/tiny in float16, and from a table of what Python knows better: the frequencies of every method,
the tokenizer's pieces, the passkey's words, two texts.
"""
import base64
import contextlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the core lies one folder up

from common.cli import field, parse, run_command
from common.errors import UserError
from common.files import whole_file
from data.passkey import GARBAGE, INFORMATION, INTRODUCTION, QUESTION
from data.tokenizer import Tokenizer
from methods import METHODS, RopeConfig, inv_freq
from model import LLaMA, ModelConfig
from weights import load_model, load_tokenizer

REPOSITORY = Path(__file__).resolve().parent.parent
PAGE_PARTS = REPOSITORY / "docs" / "playground"
SAMPLES = ("common/files.py", "common/cli.py")
PAGE_FACTORS = (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 32)
LONGEST = 2048          # tokens of a text
INCLUDE = re.compile(r"\{\{ (\S+) \}\}")


@dataclass
class PlaygroundFlags:
    out: str = field("docs/playground.html", "the page")
    picture: str | None = field(None, "also a PNG of it, as a browser shows the walk's fourth step")


def page(model: LLaMA, tokenizer: Tokenizer) -> str:
    """The whole page: page.html, where {{ name }} stands for a file beside it, `tables` or
    `weights`."""
    made = {"tables": script_json(page_tables(model, tokenizer)), "weights": half_weights(model)}

    def content(found: re.Match) -> str:
        name = found.group(1)
        return made.get(name) or (PAGE_PARTS / name).read_text(encoding="utf-8").rstrip("\n")

    return INCLUDE.sub(content, (PAGE_PARTS / "page.html").read_text(encoding="utf-8"))


def page_tables(model: LLaMA, tokenizer: Tokenizer) -> dict[str, Any]:
    """What the page's JavaScript is told instead of computing it once more."""
    c = model.config
    return {
        "config": {"dim": c.dim, "headDim": c.head_dim, "heads": c.n_heads, "layers": c.n_layers,
                   "eps": c.norm_eps, "window": c.original_window, "longest": LONGEST},
        "tensors": [[name, list(tensor.shape)] for name, tensor in model.state_dict().items()],
        "factors": PAGE_FACTORS,
        "methods": {name: frequencies(name, c) for name in page_methods()},
        "maps": {name: list(method.settings) for name, method in METHODS.items()
                 if method.distance_map is not None},
        "pieces": [tokenizer.model.id_to_piece(i) for i in range(tokenizer.vocab_size)],
        "bos": tokenizer.bos_id,
        "passkey": {"introduction": INTRODUCTION, "garbage": GARBAGE, "information": INFORMATION,
                    "question": QUESTION},
        "samples": {path: sample_text(path, tokenizer) for path in SAMPLES},
    }


def page_methods() -> list[str]:
    """Methods that stretch plain RoPE by frequencies which do not change with the text. p-RoPE is
    left out: without a share of its own it is `linear`."""
    return [name for name, method in METHODS.items()
            if method.extends_rope and method.mechanism == "angles" and name != "proportional"
            and not method.length_dependent and not method.needs_settings]


def frequencies(name: str, config: ModelConfig) -> list[dict[str, Any]]:
    """A method's theta_i and its factor of cos and sin, for each of PAGE_FACTORS."""
    rows = []
    for factor in PAGE_FACTORS:
        rope = RopeConfig(name, float(factor), config.original_window, config.rope.rope_theta)
        theta, attention_factor = inv_freq(rope, config.head_dim)
        rows.append({"frequencies": theta.tolist(), "attentionFactor": attention_factor})
    return rows


def sample_text(path: str, tokenizer: Tokenizer) -> str:
    """The beginning of one of our own files: LONGEST tokens and a little more."""
    ids = tokenizer.encode((REPOSITORY / path).read_text(encoding="utf-8"))
    return tokenizer.decode(ids[:LONGEST + 64])


def half_weights(model: LLaMA) -> str:
    """All tensors in float16, one behind the other, in base64."""
    flat = [tensor.numpy().astype("<f2").tobytes() for tensor in model.state_dict().values()]
    text = base64.b64encode(b"".join(flat)).decode()
    return re.sub("(.{100})", r"\1\n", text)


def script_json(value: Any) -> str:
    """JSON that no browser takes for the end of its script element."""
    return json.dumps(value, ensure_ascii=False).replace("</", "<\\/")


# ---- In a browser --------------------------------------------------------------------------------

@contextlib.contextmanager
def open_browser(width: int = 1360, height: int = 1240, dark: bool = False) -> Iterator[Any]:
    """A headless Chromium of this size, as Selenium drives it. Nothing of it stays."""
    try:
        from selenium import webdriver
        from selenium.common.exceptions import WebDriverException
    except ImportError:
        raise UserError("a browser is driven by a package: pip install selenium") from None
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""        # else Selenium finds Chrome
    for flag in ("headless=new", "disable-gpu", "no-first-run", "disable-background-networking"):
        options.add_argument(f"--{flag}")
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        options.add_argument("--no-sandbox")                        # which root cannot have
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    try:
        driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    except WebDriverException as error:
        raise UserError(f"no browser started ({error.msg:.200}): install chromium and "
                        "chromium-driver") from None
    try:
        set_screen(driver, width, height, dark)
        yield driver
    finally:
        driver.quit()


def set_screen(driver: Any, width: int, height: int, dark: bool = False) -> None:
    """The size of the window in pixels, and which colours its user prefers."""
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
        "width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600})
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [
        {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]})


def open_page(driver: Any, path: str | Path, settings: str = "", limit: float = 120) -> None:
    """The page with these settings in its address, when it has read its texts."""
    driver.get("about:blank")                            # another # alone would not load it anew
    driver.get(f"{Path(path).resolve().as_uri()}#{settings}")
    wait_for(driver, "document.getElementById('status').textContent.startsWith('read in')", limit)


def wait_for(driver: Any, condition: str, limit: float = 120) -> None:
    """Until a JavaScript expression is true."""
    end = time.monotonic() + limit
    while not driver.execute_script(f"return {condition}"):
        if time.monotonic() > end:
            raise UserError(f"the page did not come to {condition} in {limit:.0f} seconds")
        time.sleep(0.05)


def main(argv: Sequence[str] | None = None) -> None:
    flags = parse(PlaygroundFlags, __doc__, argv)
    tiny = REPOSITORY / "data" / "tiny"
    html = page(load_model(tiny), load_tokenizer(tiny))
    with whole_file(flags.out, "w") as file:
        file.write(html)
    print(f"{flags.out}   {len(html.encode()) / 1e6:.2f} MB, {len(page_methods())} methods by "
          f"frequencies and {sum(m.distance_map is not None for m in METHODS.values())} maps")
    if flags.picture:
        with open_browser(height=750) as driver, whole_file(flags.picture) as file:
            open_page(driver, flags.out, "method=yarn&tokens=512")
            file.write(driver.get_screenshot_as_png())


if __name__ == "__main__":
    run_command(main)
