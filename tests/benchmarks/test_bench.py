"""`strainer-fast bench`: a run from the command line, its tables and page, two runs compared, pages kept up to date."""

import copy
import importlib
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from strainer_fast.benchmarks import kernels_side, publish
from strainer_fast.benchmarks import run as running
from strainer_fast.benchmarks.compare import Noise, changes, comparison, noise_of
from strainer_fast.benchmarks.harness import OURS, machine
from strainer_fast.benchmarks.page import page
from strainer_fast.benchmarks.plots import THEMES, plots, svg
from strainer_fast.benchmarks.tables import markdown, suite_table
from strainer_fast.cli import app

ROOT = Path(__file__).parents[2]
KERNELS = {
    "compiled": [
        {"chip": "sm_90", "kernel": "forward", "precision": "fp16", "cases": ["step/forward"],
         "report": {"registers": 96, "spilled": 0, "shared": 1024, "blocks": 2}, "error": ""},
        {"chip": "sm_90", "kernel": "adam", "precision": "fp16", "cases": ["step/adam"], "report": None,
         "error": "<b>broken</b>"},
    ],
    "predicted": {"sm_90": [{"kernel": "forward", "predicted_us": 4.0, "bound": "matrix"}]},
    "measured": None,
}  # fmt: skip


def row(provider: str, ms: float, **more: Any) -> dict[str, Any]:
    return {
        "suite": "step", "table": "sizes", "case": f"5x256, {more.get('size', 8)}", "threads": 2, "device": "cpu",
        "axes": {"points": more.pop("size", 8) ** 2, "width": 256, "signals": 1}, "provider": provider,
        "flops": 10**9, "bytes": None, "peak_mb": 3.0, "sgemm_gflops": 100.0,
        "median_ms": ms, "p20_ms": 0.95 * ms, "p80_ms": 1.05 * ms, "samples_ms": [ms],
    } | more  # fmt: skip


def document(scale: float = 1.0, ours: float = 1.0) -> dict[str, Any]:
    rows = [row(OURS, ours * scale * size, size=size) for size in (8, 16)]
    rows += [row(f"peer {i}", 3 * scale * size, size=size) for size in (8, 16) for i in range(2)]
    refused = row("<script>", 1.0) | {"refused": "gradient 0 off by 1.0e-02, bound 1.0e-04"}
    rows.append({k: v for k, v in refused.items() if not k.endswith("_ms")})
    fit = {"suite": "fit", "table": "fit", "case": "scan 72x72, 35 dB", "axes": {"points": 5184}, "steps": 2,
           "curve": {"seconds": [0.1, 0.2, 0.3], "psnr": [10.0, 20.0, 36.0]}, "flops": None}  # fmt: skip
    rows.append(row(OURS, 300.0) | fit)
    data = {"suite": "dataset", "table": "dataset", "data": "28x28 digits, 3x32", "target": None, "flops": None}
    rows += [row(OURS, 5.0 / n) | data | {"case": f"N = {n}", "axes": {"signals": n}} for n in (1, 16)]
    found = {"format": 1, "machine": machine(), "quick": False, "device": "cpu", "seconds": 1.0}
    return found | {"rows": rows, "kernels": copy.deepcopy(KERNELS)}


def test_tables_have_the_faster_first_and_say_what_was_refused() -> None:
    headings, cells = suite_table("step", document()["rows"])
    assert headings[:5] == ["case", "provider", "threads", "ms (p20 to p80)", "against ours"]
    first = [line[1] for line in cells if line[0] == "5x256, 8"]
    assert first == [f"**{OURS}**", "peer 0", "peer 1", "<script>"]
    assert cells[0][3:8] == ["8 (7.6 to 8.4)", "1.00", "125", "125 %", "3"]
    assert cells[1][4] == "3.00" and cells[3][-1].startswith("refused: gradient 0")
    text = markdown(document())
    assert "## Whole data sets" in text and "| N = 16 | **strainer_fast** | 3200 |" in text
    assert "| scan 72x72, 35 dB | **strainer_fast** | 0.3 (0.285 to 0.315) | 1.00 | 2 |" in text


class Reader(HTMLParser):
    """Tags that are open, and everything a page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "path", "use", "rect", "line"):
            self.open.append(tag)
        self.loads += [v for k, v in attributes if k in ("src", "href", "xlink:href") and v and not v.startswith("#")]

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1] == tag:
            self.open.pop()


def test_the_page_stands_alone() -> None:
    """One file that loads nothing, escaped, for light and dark; measured columns are there, and empty."""
    text = page(document())
    reader = Reader()
    reader.feed(text)
    assert reader.open == [] and reader.loads == []
    assert "script" not in reader.tags and "&lt;script&gt;" in text and "&lt;b&gt;broken" in text
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text
    assert text.count("<figure>") == len(plots(document())) and text.count('class="dark"') == text.count("<figure>")
    referred = re.findall(r"(?:href=\"|url\()#([^\")]+)", text)
    assert referred and all(text.count(f'id="{each}"') == 1 for each in set(referred))  # one plot's, not another's
    assert "<th>measured us</th>" in text
    assert "<td>forward</td><td>4</td><td>matrix</td><td></td><td></td>" in text


def test_a_gpus_measurements_fill_the_columns() -> None:
    found = document()
    found["kernels"]["measured"] = {
        "predictions": [
            {"case": case, "chip": "sm_90", "precision": "fp16", "kernels": [{"kernel": "forward", "median_ms": ms}]}
            for case, ms in (("512x512, 5x256", 9.0), (kernels_side.STEP, 0.006))
        ]
    }
    assert "<td>forward</td><td>4</td><td>matrix</td><td>6</td><td>1.50</td>" in page(found)
    assert kernels_side.measured_us(found, "sm_80", 0) is None
    found["kernels"]["predicted"]["sm_90"][0]["kernel"] = "another"  # of another version: nothing to compare
    assert kernels_side.measured_us(found, "sm_90", 0) is None


def test_plots_are_the_same_for_the_same_numbers() -> None:
    found = {plot.name: plot for plot in plots(document())}
    assert {"step-latency", "step-memory", "psnr-seconds-72x72", "psnr-steps-72x72", "fits-digits-steps"} <= set(found)
    assert found["step-latency"].lines[OURS] == [(64, 8.0), (256, 16.0)]
    drawn = {theme: svg(found["step-latency"], theme) for theme in THEMES}
    assert drawn["light"] == svg(found["step-latency"], "light") != drawn["dark"]
    assert all(">peer 0<" in text and "<script" not in text for text in drawn.values())


def test_only_what_changed_beyond_noise_is_said() -> None:
    """The machine was half as fast in the second run: its peers say so, and it is taken out."""
    before, after = document(), document(scale=2.0, ours=1.3)
    found, noises = changes(before["rows"], after["rows"])
    assert noises["step"].drift == pytest.approx(2.0)
    changed = [c for c in found if c.beyond_noise]
    assert [(c.row["provider"], round(c.corrected, 3)) for c in changed] == [(OURS, 1.3)] * 2
    text, same = comparison(before, after)
    assert same == changed
    assert "| step | 5x256, 8 | strainer_fast | 2 | 8 | 20.8 | 1.30 | slower |" in text
    assert "2 of 9 rows changed beyond noise" in text
    assert "0 of 9 rows changed" in comparison(before, document(scale=2.0))[0]
    assert "0 of 9 rows changed" in comparison(before, document(ours=1.08))[0]  # within p20 to p80
    del after["rows"][0]
    assert "1 rows are only in the first file" in comparison(before, after)[0]


def test_a_restless_machine_hides_small_changes() -> None:
    """Twenty peers: of those that are the same, 19 within 1.2; a change of 1.15 is noise then, one of 1.3 is not."""
    peers = [*[1 / 1.2] * 9, 1.0, 1.0, *[1.2] * 8, 3.0]
    assert math.exp(noise_of(peers).level) == pytest.approx(1.2, rel=0.02)
    assert math.exp(noise_of([1.0] * 20).level) == pytest.approx(1.03)
    assert noise_of([5.0, 5.0]) == Noise()  # too few to tell

    def rows(factors: list[float], ours: float) -> list[dict[str, Any]]:
        return [row(OURS, 10 * ours), *(row(f"peer {i}", 10 * f) for i, f in enumerate(factors))]

    for ours, beyond in ((1.15, ["peer 19"]), (1.3, [OURS, "peer 19"])):
        found, _ = changes(rows([1.0] * 20, 1.0), rows(peers, ours))
        assert [c.row["provider"] for c in found if c.beyond_noise] == beyond


def test_the_command_measures_and_compares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest real run: one suite, its quick case."""
    monkeypatch.setattr(running, "kernels_side", lambda *a: KERNELS)
    out = tmp_path / "run"
    done = CliRunner().invoke(app, ["bench", "--quick", "--suite", "render", "--out", str(out), "--quiet"])
    assert done.exit_code == 0, (done.output, [p.read_text()[-2000:] for p in out.glob("*.log")])
    kept = running.load(out)
    assert {r["suite"] for r in kept["rows"]} == {"render"} and kept["rows"][0]["provider"] == OURS
    assert kept["quick"] and kept["machine"]["torch"]
    assert all("median_ms" in r for r in kept["rows"] if "not_run" not in r)
    assert {p.name for p in out.iterdir()} >= {"bench.json", "report.md", "report.html", "rows.jsonl", "render.json"}
    assert json.loads((out / "render.json").read_text())["benchmarks"]  # pytest-benchmark's own
    compared = CliRunner().invoke(app, ["bench", "--compare", str(out), str(out / "bench.json")])
    assert compared.exit_code == 0 and "0 of " in compared.output


def test_what_was_measured_survives_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A suite that breaks, and a run that is stopped: rows before it are in the report, and the rest is said."""

    def measure(suite: str, quick: bool, device: str, out: Path, quiet: bool) -> int:
        if suite == "fit":
            raise KeyboardInterrupt
        if suite == "step":
            return 3
        with (out / "rows.jsonl").open("a") as file:
            file.write(json.dumps(row(OURS, 1.0)) + "\n")
        return 0

    monkeypatch.setattr(running, "_measure", measure)
    monkeypatch.setattr(running, "kernels_side", lambda *a: KERNELS)
    with pytest.raises(RuntimeError, match=r"step \(code 3: see .*step\.log\)"):
        running.run(["layers", "step", "render"], True, "cpu", tmp_path)
    assert len(running.load(tmp_path)["rows"]) == 2 and "measured us" in (tmp_path / "report.html").read_text()
    with pytest.raises(KeyboardInterrupt):
        running.run(["layers", "fit", "render"], True, "cpu", tmp_path)
    assert len(running.load(tmp_path)["rows"]) == 1 and "was stopped" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--suite", "nothing"], "some of layers, step, fit, dataset, render"),
        (["--device", "cuda"], "sees no GPU"),
        (["--compare", "no.json", "none.json"], "a bench.json of"),
    ],
)
def test_unusable_input(arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    done = CliRunner().invoke(app, ["bench", *arguments, "--out", str(tmp_path / "out")])
    assert done.exit_code == 2 and said in re.sub(r"\s+", " ", done.output)
    assert not (tmp_path / "out").exists()


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("strainer_fast.cli.bench"), "find_spec", lambda name: None)
    done = CliRunner().invoke(app, ["bench"])
    assert done.exit_code == 2 and "strainer-fast[bench]" in done.output


def test_tables_between_markers() -> None:
    begin, end = "<!-- sizes table: begin -->", "<!-- sizes table: end -->"
    text = f"before\n{begin}\nold\n{end}\nafter\n"
    once = publish.updated(text, document())
    assert once == publish.updated(once, document())
    assert once.startswith(f"before\n{begin}\n") and once.endswith(f"{end}\nafter\n") and "old" not in once
    assert "| 5x256, 16 | **strainer_fast** | 2 | 16 (15.2 to 16.8) | 1.00 |" in once


def test_the_pages_show_the_committed_run() -> None:
    kept = running.load(ROOT / "benchmarks" / "results" / "cpu.json")
    seen = []
    for name in publish.PAGES:
        text = (ROOT / name).read_text()
        seen += re.findall("<!-- (.*?) table: begin", text)
        assert publish.updated(text, kept) == text, name
        for picture in re.findall(r"docs/plots/\S+?\.svg|\(plots/\S+?\.svg\)", text):
            assert (ROOT / "docs" / picture.strip("()").removeprefix("docs/")).is_file(), picture
    assert {"step", "dataset", "sizes", "layers", "fit", "render"} <= set(seen)
    assert [p.name for p in plots(kept) if not (ROOT / "docs" / "plots" / f"{p.name}-dark.svg").is_file()] == []
