"""The web page as a visitor feels it: from the click to the first preview and to all images.

    python benchmarks/web_page.py                   # 4 images of 128x256 in 20 steps, the Streets models
    python benchmarks/web_page.py --num 1 --steps 8 --repeat 5

Starts gradio_seg2image.py, opens it in a headless Chromium, which must be on the PATH, and clicks. Beside it
stands how long the same order takes without a page: what is left is previews, files and transport.
"""

from __future__ import annotations

import argparse
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import ROOT, environment, figures, open_project, report, say

START_SECONDS = 120
SETTLE_MS = 1000  # until Gradio listens to what it has drawn


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read and check the arguments."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    add = parser.add_argument
    add("--num", type=int, default=4, help="images (default: %(default)s)")
    add("--steps", type=int, default=20, help="of each (default: %(default)s)")
    add("--repeat", type=int, default=3, help="counted clicks (default: %(default)s)")
    add("--size", type=int, nargs=2, help=argparse.SUPPRESS)  # as the others take; here the model's
    args = parser.parse_args(argv)
    if min(args.num, args.steps, args.repeat) < 1:
        parser.error("--num, --steps and --repeat must be 1 or more")
    if shutil.which("chromium") is None:
        parser.error("no chromium on the PATH; on Debian: apt install chromium")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the page, then the same order without it."""
    args = parse_args(argv)
    command = [sys.executable, "gradio_seg2image.py"]
    begin = time.monotonic()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        line = process.stdout.readline() if process.stdout else ""
        found = re.match(r"open (http://\S+?)/? ", line)
        if found is None:
            sys.exit("the page did not start; its reason is above")
        started = time.monotonic() - begin
        try:
            clicks = [click for click in visit(found[1], args) if click]
        finally:
            process.send_signal(signal.SIGINT)
    plain = order_without_page(args)
    names = ("first_preview_s", "all_images_s")
    medians = {name: figures(statistics.median(click[name] for click in clicks)) for name in names}
    report(
        {
            "benchmark": "web_page",
            **{name: getattr(args, name) for name in ("num", "steps")},
            "page_answers_s": figures(started),
            **medians,
            "without_page_s": figures(plain),
            "environment": environment(),
        }
    )


def visit(url: str, args: argparse.Namespace) -> list[dict[str, float]]:
    """Seconds of each click but the first."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        tab = browser.new_page()
        tab.goto(url)
        tab.locator("#note", has_text="The images appear here").wait_for(timeout=START_SECONDS * 1000)
        tab.get_by_role("button", name="More settings").click()
        tab.wait_for_timeout(SETTLE_MS)
        for name in ("num", "steps"):
            field = tab.locator(f"#{name} input[type=number]")
            field.fill(str(getattr(args, name)))
            field.press("Tab")
        clicks = [one_click(tab, i, args) for i in range(args.repeat + 1)]
        browser.close()
    return clicks[1:]


def one_click(tab: Any, seed: int, args: argparse.Namespace) -> dict[str, float]:
    """Seconds to the first preview and until every image is there, decoded."""
    field = tab.locator("#seed input")
    field.fill(str(10 * seed))
    field.press("Tab")
    begin = time.monotonic()
    tab.click("#paint")
    tab.locator("#live .previews img").first.wait_for()
    preview = time.monotonic() - begin
    last = f"_seed{10 * seed + args.num - 1}.png"
    tab.wait_for_function(
        "([n, last]) => { const all = [...document.querySelectorAll('#images .thumbnail-item img')];"
        " return all.length === n && all[n - 1].src.endsWith(last) && all.every(i => i.complete); }",
        arg=[args.num, last],
        timeout=600_000,
    )
    whole = time.monotonic() - begin
    tab.locator("#paint:not([disabled])").wait_for()
    say(f"click {seed}: {preview:.2f} s, {whole:.2f} s")
    return {"first_preview_s": preview, "all_images_s": whole}


def order_without_page(args: argparse.Namespace) -> float:
    """Seconds that `generate` takes for the same images."""
    open_project()
    import torch

    from cldm.config import SampleConfig
    from cldm.generate import generate
    from cldm.model import load_model, model_config_of

    checkpoint = Path(ROOT / "models/control_streets.safetensors")
    model = load_model(model_config_of(checkpoint), checkpoint)
    hint, sample = torch.rand(1, 3, 128, 256), SampleConfig(steps=args.steps)
    seconds = []
    for _ in range(args.repeat + 1):
        begin = time.monotonic()
        generate(model, hint, ["a street"] * args.num, list(range(args.num)), sample)
        seconds.append(time.monotonic() - begin)
    return statistics.median(seconds[1:])


if __name__ == "__main__":
    main()
