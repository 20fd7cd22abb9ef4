"""A quality report as plain values for JSON, and as tables for people."""

import math
from typing import Any

from klein_kv.export.checks.compare import Difference
from klein_kv.export.checks.quality import ErrorRow, QualityReport

__all__ = ["dict_from_report", "text_from_report"]

_WORST = 5


def dict_from_report(report: QualityReport) -> dict[str, Any]:
    """Plain values; infinite ratios (no error at all) become null."""
    both = f"{report.precision} to fp32", "bf16 to fp32"
    blocks, ends = (
        [
            {"name": row.name, both[0]: _values(row.fp32), both[1]: _values(row.floor)}
            for row in rows
        ]
        for rows in (report.blocks, report.ends)
    )
    return {
        "ok": not report.failed,
        "precision": report.precision,
        "reference": report.reference,
        "samples": report.samples,
        "layers": [
            {
                "name": row.name,
                "least_snr": None
                if row.tolerance is None
                else -20 * math.log10(row.tolerance.bound),
                **_values(row.fp32),
            }
            for row in report.layers
        ],
        "blocks": blocks,
        "end_to_end": ends,
        "images": [
            {"name": row.name, "pair": pair, "psnr": _finite(likeness[0]), "ssim": likeness[1]}
            for row in report.images
            for pair, likeness in zip(
                both, ((row.psnr, row.ssim), (row.floor_psnr, row.floor_ssim)), strict=True
            )
        ],
    }


def _values(error: Difference) -> dict[str, Any]:
    return {
        "snr_db": _finite(error.snr),
        "max_abs": _finite(error.max),
        "cosine": _finite(error.cosine),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def text_from_report(report: QualityReport) -> str:
    """Tables: every block, what came out, the worst layers, images."""
    worst = sorted(report.layers, key=lambda row: row.fp32.snr)[:_WORST]
    title = f"the {len(worst)} worst of {len(report.layers)} layers"
    lines = [
        f"{report.precision} over {report.samples} requests; fp32 and bf16 are {report.reference}",
        "SNR in dB (each 6 halve the error), largest difference, cosine",
        "",
        *_table("blocks, on their inputs in fp32", report.blocks, report.precision),
        "",
        *_table("end to end", report.ends, report.precision),
        "",
        f"{title}, on their own inputs, to their own weights",
    ]
    for row in worst:
        mark = "  FAILED" if row in report.failed else ""
        lines.append(f"{row.name:48} {_columns(row.fp32)}{mark}")
    lines += ["", f"{'images to those of fp32':28} {'PSNR':>7} {'SSIM':>8} {'bf16':>9} {'SSIM':>8}"]
    lines += [
        f"{row.name:28} {row.psnr:7.2f} {row.ssim:8.5f} {row.floor_psnr:9.2f} {row.floor_ssim:8.5f}"
        for row in report.images
    ]
    if report.failed:
        lines.append(
            f"{len(report.failed)} layers have a larger error than rounding explains: their "
            "numbers or scales are damaged, or the calibration's requests were too unlike these"
        )
    return "\n".join(lines)


def _table(title: str, rows: list[ErrorRow], precision: str) -> list[str]:
    width = max([len(row.name) for row in rows] + [28, len(title)])
    head = f"{title:{width}} {precision + ' to fp32':^27} | {'bf16 to fp32':^27}"
    return [head] + [
        f"{row.name:{width}} {_columns(row.fp32):27} | {_columns(row.floor)}" for row in rows
    ]


def _columns(error: Difference) -> str:
    return f"{error.snr:7.2f} {error.max:9.2e} {error.cosine:9.6f}"
