"""The report: what it says, that it needs nothing but itself, and how a real browser shows it."""

import json
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mosaic_dist.compare import page
from mosaic_dist.compare.report import report
from mosaic_dist.convert import write_model
from mosaic_dist.convert.native import expected_shapes
from mosaic_dist.data.characters import character_tokenizer
from mosaic_dist.errors import UserError
from mosaic_dist.model import count_parameters
from mosaic_dist.spec import override
from recipes.sweeps.small import run as small
from tests.compare.folders import experts, record, write_run

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
NASTY = '<script>alert("x")</script> & "quotes"'


class Page(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)


def make_run(folder: Path) -> Path:
    records = [
        record(i, 6.0 - i / 10, memory_bytes=2**20 * (100 + i), skipped=i == 3, experts=experts(3, i))
        for i in range(1, 11)
    ]
    records[4] |= {"validation_loss": 5.25, "save_seconds": 1.5, "save_stall_seconds": 0.25}
    records[9] |= {"validation_loss": 5.5}
    write_run(folder, records, name=NASTY)
    command = ["a.py", "--data", "s3://key:wJalr@bucket/data"]
    (folder / "environment.json").write_text(json.dumps({"command": command, "packages": {"torch": "2.15"}}))
    (folder / "ds_config.json").write_text('{"zero_optimization": {"stage": 2}}\n')
    return folder


@pytest.fixture(scope="module")
def html(tmp_path_factory) -> str:
    """The report of a run with experts, as it is written by default."""
    run = make_run(tmp_path_factory.mktemp("report") / "run")
    report(str(run), samples=0)
    return (run / "report.html").read_text()


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    """The same run, for reports without pictures."""
    monkeypatch.setattr("mosaic_dist.compare.report._pictures", lambda story: {})
    monkeypatch.setattr("mosaic_dist.compare.samples.SAMPLE_TOKENS", 12)
    return make_run(tmp_path / "run")


def test_it_tells_all(html):
    parsed = Page(html)
    text = " ".join("".join(parsed.text).split())
    total = count_parameters(small.model).total
    for part in (
        f"{total:,} in all", "10 of 300", "20,480", "5.5000 at step 10, best 5.2500 at step 5", "5.0 s of training",
        "4,096 (median)", "25.0% (median)", "110 MiB", "skipped steps1", "1, 1.50 s each; training waited 0.25 s",
        "batch_tokens: 2048", '"stage": 2', "a.py --data s3://***@bucket/data", "torch2.15", NASTY,
    ):  # fmt: skip
        assert " ".join(part.split()) in text, part
    assert [tag for tag, _ in parsed.tags].count("img") == 2
    assert "Samples" not in text
    assert "wJalr" not in html


def test_it_needs_nothing_else(html):
    parsed = Page(html)
    assert not {"script", "link", "iframe", "object", "embed", "base"} & {tag for tag, _ in parsed.tags}
    for tag, attributes in parsed.tags:
        assert not [name for name in attributes if name.startswith("on") or name in ("href", "srcset", "style")], tag
        assert (attributes.get("src") or "data:image/png;base64,").startswith("data:image/png;base64,")
    assert "@import" not in page.STYLE
    assert "url(" not in page.STYLE
    assert f'<meta http-equiv="Content-Security-Policy" content="{page.POLICY}">' in html


def test_pieces_that_are_not_there(run):
    for name in ("environment.json", "ds_config.json"):
        (run / name).unlink()
    report(str(run))
    assert f"No samples: {run / 'tokenizer.json'} is missing" in (run / "report.html").read_text()
    character_tokenizer("abc").save(run / "tokenizer.json")
    report(str(run), output=str(run / "deep" / "other.html"))
    assert "has no checkpoint yet" in (run / "deep" / "other.html").read_text()
    (run / "environment.json").write_text("{")
    with pytest.raises(UserError, match=r"environment\.json is not JSON"):
        report(str(run), samples=0)
    with pytest.raises(UserError, match="give one run folder"):
        report()


def test_samples_of_an_exported_model(run, tmp_path):
    """An untrained one writes any of its letters; the texts begin with the prompt, which is shown as text."""
    letters = "<ab&>"
    tokenizer = character_tokenizer(letters)
    tokenizer.save(run / "tokenizer.json")
    spec = override(small.model, {"vocab_size": tokenizer.vocab_size, "dim": 32})
    tensors = spec.build_initialized(0).state_dict()
    named = ((name, tensors[name]) for name in expected_shapes(spec))
    write_model(tmp_path / "model", spec, named, {"run": "x", "step": 0}, run / "tokenizer.json")
    report(str(run), model=str(tmp_path / "model"), prompt="<b>", samples=4)
    html = (run / "report.html").read_text()
    texts = re.findall(r"<pre>(&lt;b&gt;[^<]*)</pre>", html)
    assert len(set(texts)) == len(texts) == 4
    assert all(set(unescape(text)) <= set(letters) for text in texts)
    assert str(tmp_path / "model") in html
    with pytest.raises(UserError, match="nowhere"):
        report(str(run), model=str(tmp_path / "nowhere"))


PROBE = """<script>
addEventListener("load", () => {
  const images = [...document.images].map(i => [i.complete, i.naturalWidth, i.naturalHeight, i.width, i.height]);
  const fetched = performance.getEntriesByType("resource").map(entry => entry.name).filter(n => !n.startsWith("data:"));
  const told = {images, fetched, dark: matchMedia("(prefers-color-scheme: dark)").matches,
    ink: getComputedStyle(document.body).color, paper: getComputedStyle(document.body).backgroundColor,
    width: innerWidth, wide: document.documentElement.scrollWidth > innerWidth};
  document.body.setAttribute("data-told", JSON.stringify(told));
});
</script></head>"""


def browse(html: str, folder: Path, *flags: str) -> dict:
    """What a script in the page sees of it, in a headless browser."""
    policy = page.POLICY + "; script-src 'unsafe-inline'"
    probed = folder / "probed.html"
    probed.write_text(html.replace(page.POLICY, policy).replace("</head>", PROBE))
    quiet = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run")
    words = [BROWSER, *quiet, f"--user-data-dir={folder / 'profile'}", *flags, "--dump-dom", probed.as_uri()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    (told,) = [dict(attributes)["data-told"] for tag, attributes in Page(done.stdout).tags if tag == "body"]
    return json.loads(told)


@pytest.mark.skipif(BROWSER is None, reason="chromium is not installed (Debian: chromium)")
@pytest.mark.parametrize("width", [1400, 420])
def test_a_browser_shows_it(html, tmp_path, width):
    told = browse(html, tmp_path, f"--window-size={width},900")
    sizes = [tuple(map(int, pair)) for pair in re.findall(r'width="(\d+)" height="(\d+)"', html)]
    assert [(w, h) for _, w, h, _, _ in told["images"]] == sizes
    assert all(complete for complete, *_ in told["images"])
    for (natural_w, natural_h), (*_, shown_w, shown_h) in zip(sizes, told["images"], strict=True):
        assert 0 < shown_w <= min(natural_w, told["width"])
        assert shown_w / shown_h == pytest.approx(natural_w / natural_h, rel=0.01)
    assert told["fetched"] == []
    assert not told["wide"], "the page scrolls sideways"
