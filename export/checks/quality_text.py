"""A quality report as plain values for JSON, and as tables for people."""

import math
from collections.abc import Callable
from typing import Any

from klein_kv.export.checks.block_ops import ErrorSum
from klein_kv.export.checks.quality import ErrorRow, QualityReport

__all__ = ["dict_from_report", "text_from_report"]

_WORST = 5


def dict_from_report(report: QualityReport) -> dict[str, Any]:
    """Plain values; infinite ratios (no error at all) become null."""
    return {
        "ok": not report.failed,
        "precision": report.precision,
        "reference": report.reference,
        "samples": report.samples,
        "layers": [
            {"name": row.name, "least_snr": report.least[row.name], **_values(row.fp32)}
            for row in report.layers
        ],
        "blocks": [_row(row, report.precision) for row in report.blocks],
        "end_to_end": [_row(row, report.precision) for row in report.ends],
        "images": [
            {
                "name": row.name,
                "pair": row.pair,
                "psnr": _finite(row.psnr),
                "ssim": row.ssim,
                "lpips": row.lpips,
            }
            for row in report.images
        ],
        "lpips_missing": report.lpips_missing,
    }


def _row(row: ErrorRow, precision: str) -> dict[str, Any]:
    pairs = {
        f"{precision} to fp32": row.fp32,
        f"{precision} to bf16": row.bf16,
        "bf16 to fp32": row.floor,
    }
    return {"name": row.name} | {name: _values(e) for name, e in pairs.items() if e is not None}


def _values(error: ErrorSum) -> dict[str, Any]:
    return {
        "snr_db": _finite(error.snr),
        "max_abs": _finite(error.largest),
        "cosine": _finite(error.cosine),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def text_from_report(report: QualityReport) -> str:
    """Tables: the worst layers, every block, what came out, images."""
    precision = report.precision
    lines = [
        f"{precision} over {report.samples} requests; fp32 and bf16 are {report.reference}",
        "SNR in dB (each 6 halve the error), largest difference, cosine",
        "",
        *_table("blocks, on their inputs in fp32", report.blocks, precision),
        "",
        *_table("end to end", report.ends, precision),
        "",
    ]
    worst = sorted(report.layers, key=lambda row: row.fp32.snr)[:_WORST]
    width = max([len(row.name) for row in worst] + [28])
    lines.append(
        f"{f'the {len(worst)} worst of {len(report.layers)} layers':{width}} "
        f"{'SNR':>7} {'largest':>9} {'cosine':>9}   on their own inputs, to their own weights"
    )
    for row in worst:
        mark = "  FAILED" if row in report.failed else ""
        lines.append(f"{row.name:{width}} {_columns(row.fp32)}{mark}")
    lines += ["", f"{'images':28} {'':16} {'PSNR':>7} {'SSIM':>8} {'LPIPS':>8}"]
    for image in report.images:
        lpips = "-" if image.lpips is None else f"{image.lpips:.4f}"
        lines.append(
            f"{image.name:28} {image.pair:>16} {image.psnr:7.2f} {image.ssim:8.5f} {lpips:>8}"
        )
    if report.lpips_missing:
        lines.append(f"no LPIPS: {report.lpips_missing}")
    if report.failed:
        lines.append(
            f"{len(report.failed)} layers have a larger error than rounding explains: their "
            "numbers or scales are damaged, or the calibration's requests were too unlike these"
        )
    return "\n".join(lines)


def _table(title: str, rows: list[ErrorRow], precision: str) -> list[str]:
    width = max([len(row.name) for row in rows] + [28, len(title)])
    heads = (f"{precision} to fp32", f"{precision} to bf16", "bf16 to fp32")
    lines = [f"{title:{width}} " + " | ".join(f"{head:^27}" for head in heads)]
    pick: tuple[Callable[[ErrorRow], ErrorSum | None], ...] = (
        lambda row: row.fp32,
        lambda row: row.bf16,
        lambda row: row.floor,
    )
    for row in rows:
        cells = (_columns(error) if (error := get(row)) else "" for get in pick)
        lines.append(f"{row.name:{width}} " + " | ".join(f"{cell:27}" for cell in cells))
    return lines


def _columns(error: ErrorSum) -> str:
    return f"{error.snr:7.2f} {error.largest:9.2e} {error.cosine:9.6f}"
