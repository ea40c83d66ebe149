"""Run what is missing, append a row per fit, and draw tables and plots from the rows.

python -m strainer_fast.benchmarks.time_to_psnr search    # leads, at 96x96, on the images of the search
python -m strainer_fast.benchmarks.time_to_psnr grid      # what the tuned SIRENs are chosen from
python -m strainer_fast.benchmarks.time_to_psnr small     # what whole fits of small networks can do
python -m strainer_fast.benchmarks.time_to_psnr denoise   # how good a prior each start is
python -m strainer_fast.benchmarks.time_to_psnr report    # the reported fits, 178x178, images nobody tuned on
python -m strainer_fast.benchmarks.time_to_psnr timing    # seconds a step of each method, interleaved
python -m strainer_fast.benchmarks.time_to_psnr write     # Markdown, JSON and plots from the rows

A row is identified by method, domain, image, size, steps and seed; what is there is not run again, so any of these can
be stopped and started. Encoders are kept in benchmarks/results/encoders, which is not committed: hours of pre-training.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import strainer_fast as sf
from strainer_fast.benchmarks.harness import machine
from strainer_fast.benchmarks.time_to_psnr.domains import DOMAINS, REPORT_SIZE, SEARCH_SIZE, training_signals
from strainer_fast.benchmarks.time_to_psnr.methods import PRIORS, REPORTED, SEARCHED, SIREN_GRID, SMALL, Method, Source

RESULTS = Path(__file__).resolve().parents[1] / "results"
ENCODERS = RESULTS / "encoders"
FILES = {name: f"psnr-{name}.jsonl" for name in ("search", "grid", "small", "report")}
DENOISING = RESULTS / "psnr-denoising.jsonl"
TIMING = RESULTS / "psnr-timing.jsonl"
SEARCH_STEPS, GRID_STEPS, REPORT_STEPS = 60, 100, 300
SMALL_SIZE, SMALL_STEPS, SMALL_NETWORK = 28, 300, sf.Architecture(32, 4, 3)
KEY = ("method", "domain", "image", "size", "steps", "seed")
TIMED_STEPS, TRAINED_STEPS = 10, 5
DENOISE_STEPS, DEVIATION = 100, 0.1
"""Of denoising: steps, and the noise's deviation on values in [0, 1]."""


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a file; a last line that was cut short is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            print(f"{path.name}: a line that was cut short is run again", flush=True)
    return rows


def append(path: Path, row: dict[str, Any]) -> None:
    """One line, on the disk when this returns."""
    path.parent.mkdir(exist_ok=True)
    cut_short = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    with path.open("a") as file:
        file.write(("\n" if cut_short else "") + json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _of_training(recipe: dict[str, Any]) -> dict[str, Any]:
    """The fields that an encoder depends on."""
    shared = ("betas", "eps", "momentum", "damping", "refresh_every", "seed", "inner_steps", "inner_learning_rate")
    return {k: v for k, v in recipe.items() if k.startswith("pretrain_") or k in (*shared, "meta_batch")}


def signals_of(source: Source, domain: str, size: int, seed: int, reporting: bool) -> list[sf.Signal]:
    """What an encoder trains on."""
    signals = training_signals(domain, size, reporting)[: source.images] if source.images != 0 else []
    if source.noise is not None:
        shape, channels = (signals[0].shape, signals[0].channels) if signals else ((size, size), 1)
        signals += sf.signals.noise(source.noise, 10, shape, channels=channels, amplitude=source.amplitude, seed=seed)
    return signals


def encoder_of(
    source: Source, domain: str, size: int, seed: int, reporting: bool, network: sf.Architecture | None = None
) -> sf.Encoder:
    """Trained, or from the file of an earlier run."""
    size = source.size or size
    steps = source.steps_on(domain)
    own = domain if source.noise is None or source.images != 0 else "noise"  # noise serves every domain
    split = "report" if reporting else "search"
    path = ENCODERS / f"{split}-{source.name}-{own}-{size}-{steps}-seed{seed}.safetensors"
    recipe = sf.recipe(source.recipe, **source.changes, pretrain_steps=steps, seed=seed)
    if path.exists():
        encoder = sf.Encoder.load(path)
        if _of_training(encoder.record["recipe"]) != _of_training(recipe.as_dict()):
            raise SystemExit(f"{path} was made by another recipe: delete it, or give the source another name")
        return encoder
    signals = signals_of(source, domain, size, seed, reporting)
    ENCODERS.mkdir(parents=True, exist_ok=True)
    print(f"  pre-training {path.stem}: {len(signals)} signals, {steps} steps", flush=True)
    encoder = sf.pretrain(signals, recipe, architecture=network, checkpoint=path.with_suffix(".checkpoint"))
    encoder.save(path)
    path.with_suffix(".checkpoint").unlink(missing_ok=True)
    return encoder


def run(
    path: Path,
    methods: Iterable[Method],
    domains: Sequence[str],
    split: str,
    size: int,
    steps: int,
    seeds: Sequence[int],
    images: int | None,
    network: sf.Architecture | None = None,
) -> None:
    """Fit what has no row yet."""
    done = {tuple(row[k] for k in KEY) for row in read_rows(path)}
    for method in methods:
        for domain in domains:
            for seed in seeds:
                encoder: sf.Encoder | None = None
                for signal in DOMAINS[domain].load(split, size)[:images]:
                    key = (method.name, domain, signal.name, size, steps, seed)
                    if key in done:
                        continue
                    if encoder is None and method.source is not None:
                        encoder = encoder_of(method.source, domain, size, seed, split == "report", network)
                    recipe = method.fit_recipe(steps=steps, seed=seed, until_exact=split == "report")
                    began = time.perf_counter()
                    result = sf.fit(signal, encoder or "siren", recipe, architecture=None if encoder else network)
                    row: dict[str, Any] = dict(zip(KEY, key, strict=True)) | {
                        "shape": list(signal.values.shape),
                        "recipe": recipe.as_dict(),
                        "pretraining": pretraining(method, encoder),
                        "psnr": [round(float(p), 3) if np.isfinite(p) else None for p in result.curves[0].psnr],
                        "final": result.psnr[0] if np.isfinite(result.psnr[0]) else None,
                        "stop": result.stop_reasons[0],
                        "between": between_pixels(signal, encoder, recipe) if split == "tune" and not network else None,
                        "version": sf.__version__,
                        "date": time.strftime("%Y-%m-%d"),
                    }
                    append(path, row)
                    seconds = time.perf_counter() - began
                    reached = {t: first_step(row["psnr"], t) for t in (30, 40, 50)}
                    print(f"{' | '.join(map(str, key))}: {reached}, {seconds:.0f} s", flush=True)


def pretraining(method: Method, encoder: sf.Encoder | None) -> dict[str, Any] | None:
    """What is known of the encoder behind a row."""
    if method.source is None or encoder is None:
        return None
    record = encoder.record
    known = [p for p in record["psnr"] if p is not None]
    return {
        "source": method.source.name,
        "steps": record["steps"],
        "shape": record["shape"],
        "signals": len(record["signals"]),
        "psnr": float(np.median(known)) if known else None,
    }


def between_pixels(signal: sf.Signal, encoder: sf.Encoder | None, recipe: sf.Recipe) -> float:
    """dB on the pixels that a fit to every second row and column, to 40 dB, never saw."""
    values = signal.values[: signal.shape[0] // 2 * 2 - 1, : signal.shape[1] // 2 * 2 - 1]
    half = sf.Signal(values[::2, ::2].contiguous(), f"{signal.name}-half")
    result = sf.fit(half, encoder or "siren", replace(recipe, until_exact=False), target_psnr=40.0)
    unseen = torch.ones(values.shape[:2], dtype=torch.bool)
    unseen[::2, ::2] = False
    error = (result.render(tuple(values.shape[:2]))[0] - values)[unseen].square().mean()
    return float(-10 * torch.log10(error))


def denoise(methods: Iterable[Method], domains: Sequence[str], seeds: Sequence[int]) -> None:
    """Best PSNR against the clean image while fitting a noisy one: how good a prior a start and an optimiser are."""
    done = {tuple(row[k] for k in ("method", "domain", "image", "seed")) for row in read_rows(DENOISING)}
    for method in methods:
        for domain in domains:
            for seed in seeds:
                encoder: sf.Encoder | None = None
                for clean in DOMAINS[domain].load("tune", SEARCH_SIZE)[:1]:
                    if (method.name, domain, clean.name, seed) in done:
                        continue
                    if encoder is None and method.source is not None:
                        encoder = encoder_of(method.source, domain, SEARCH_SIZE, seed, False)
                    generator = torch.Generator().manual_seed(seed)
                    noise = DEVIATION * torch.randn(clean.values.shape, generator=generator)
                    noisy = sf.Signal((clean.values + noise).clamp(0, 1), f"{clean.name}-noisy")
                    curve: list[float] = []

                    def look(progress: sf.Progress, clean: sf.Signal = clean, curve: list[float] = curve) -> None:
                        with torch.no_grad():
                            error = (progress.module(0)(clean.points()) - clean.samples()).square().mean()
                        curve.append(round(float(-10 * torch.log10(error)), 3))

                    sf.fit(noisy, encoder or "siren", method.fit_recipe(steps=DENOISE_STEPS, seed=seed), on_check=look)
                    row = {"method": method.name, "domain": domain, "image": clean.name, "seed": seed}
                    start = float(-10 * torch.log10((noisy.values - clean.values).square().mean()))
                    append(DENOISING, row | {"noisy": start, "clean_psnr": curve})
                    print(
                        f"{method.name} | {domain}: {start:.1f} dB, best {max(curve):.1f} at {np.argmax(curve)}",
                        flush=True,
                    )


def first_step(psnr: Sequence[float | None], target: float) -> int | None:
    """The first step whose weights reach `target` dB."""
    return next((i for i, p in enumerate(psnr) if p is None or p >= target), None)


def _training_step(source: Source, domain: str) -> float:
    """Seconds of a step of pre-training."""
    signals = signals_of(source, domain, source.size or REPORT_SIZE, 0, True)
    recipe = sf.recipe(source.recipe, **source.changes, pretrain_steps=TRAINED_STEPS)
    # The loss after the last step is computed too.
    return float(sf.pretrain(signals, recipe).record["seconds"]) / (TRAINED_STEPS + 1)


def time_methods(rounds: int) -> None:
    """Seconds until the first step and per step of all methods that have rows, in turn, round after round."""
    fitted = {(r["method"], r["domain"]) for r in read_rows(RESULTS / FILES["report"])}
    for domain in DOMAINS:
        methods = [m for m in REPORTED if (m.name, domain) in fitted]
        if not methods:
            continue
        signal = DOMAINS[domain].load("report", REPORT_SIZE)[0]
        seen: dict[str, list[tuple[float, float]]] = {m.name: [] for m in methods}
        encoders = {
            m.name: None if m.source is None else encoder_of(m.source, domain, REPORT_SIZE, 0, True) for m in methods
        }
        training: dict[str, list[float]] = {m.name: [] for m in methods}
        for _ in range(rounds + 1):
            for method in methods:
                if method.source is not None:
                    training[method.name].append(_training_step(method.source, domain))
                recipe = method.fit_recipe(steps=TIMED_STEPS)
                seconds = sf.fit(signal, encoders[method.name] or "siren", recipe).curves[0].seconds
                seen[method.name].append((float(seconds[0]), float(seconds[-1] - seconds[0]) / TIMED_STEPS))
        for name, times in seen.items():
            starts, steps = (sorted(each) for each in zip(*times[1:], strict=True))
            row: dict[str, Any] = {
                "method": name,
                "domain": domain,
                "rounds": rounds,
                "start_seconds": float(np.median(starts)),
                "step_seconds": float(np.median(steps)),
                "spread": [steps[0], steps[-1]],
                "pretrain_step_seconds": float(np.median(training[name][1:])) if training[name] else 0.0,
                "threads": torch.get_num_threads(),
                "machine": machine(),
            }
            append(TIMING, row)
            print(
                f"{domain} {name}: start {row['start_seconds']:.3f} s, step {1e3 * row['step_seconds']:.0f} ms",
                flush=True,
            )


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        prog="python -m strainer_fast.benchmarks.time_to_psnr", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("what", choices=("search", "grid", "small", "denoise", "report", "timing", "write"))
    parser.add_argument("--domains", nargs="+", default=["brain-mri", "photos", "faces"], choices=list(DOMAINS))
    parser.add_argument("--methods", nargs="+", default=[""], help="only those whose name has one of these in it")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the search; the report has seed 0")
    parser.add_argument("--size", type=int, help="of the images; 96 in the search, 178 in the report")
    parser.add_argument("--images", type=int, help="at most so many of each domain")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=5, help="of timing")
    asked = parser.parse_args()
    if asked.threads:
        torch.set_num_threads(asked.threads)
    if asked.what == "write":
        from strainer_fast.benchmarks.time_to_psnr.report import write

        write()
        return
    if asked.what == "denoise":
        denoise([m for m in PRIORS if any(p in m.name for p in asked.methods)], asked.domains, asked.seeds)
        return
    if asked.what == "timing":
        time_methods(asked.rounds)
        return
    methods, split, size, steps = {
        "search": (SEARCHED, "tune", SEARCH_SIZE, SEARCH_STEPS),
        "grid": (SIREN_GRID, "tune", SEARCH_SIZE, GRID_STEPS),
        "small": (SMALL, "tune", SMALL_SIZE, SMALL_STEPS),
        "report": (REPORTED, "report", REPORT_SIZE, REPORT_STEPS),
    }[asked.what]
    chosen = [m for m in methods if any(part in m.name for part in asked.methods)]
    seeds = [0] if asked.what == "report" else asked.seeds
    network = SMALL_NETWORK if asked.what == "small" else None
    run(
        RESULTS / FILES[asked.what],
        chosen,
        asked.domains,
        split,
        asked.size or size,
        steps,
        seeds,
        asked.images,
        network,
    )


if __name__ == "__main__":
    main()
