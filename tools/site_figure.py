"""The figure of the landing page, docs/assets/measured.svg, drawn from the recorded runs in `papers/records`.

python tools/site_figure.py --write
python tools/site_figure.py --check     exit 1 if the figure differs from the records
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FIGURE = ROOT / "docs" / "assets" / "measured.svg"
WIDTH, ROW, LEFT, BAR = 760, 26, 330, 300
INK, GREY, GOOD, BAD = "#1f2937", "#6b7280", "#3f51b5", "#c2410c"


def record(slug: str) -> dict[str, float]:
    """Metrics and baselines of one recorded run at CPU scale."""
    text = (ROOT / "src" / "headwise" / "papers" / "records" / f"{slug}.json").read_text(encoding="utf-8")
    found = json.loads(text)
    runs = found if isinstance(found, list) else [found]
    run = next(run for run in runs if run["scale"] == "cpu")
    return {**run["metrics"], **run["baselines"]}


def groups() -> list[tuple[str, list[tuple[str, float, str, str]]]]:
    """Title → rows (label, share in [0, 1], what stands behind the bar, colour)."""
    heads, duo = record("retrieval-head"), record("duoattention")
    cache = f"{duo['cache_share_25pct']:.0%} of the cache"
    return [
        (
            "Passkeys answered exactly, of smollm2's 270 heads",
            [
                ("nothing taken out", heads["recall_intact"], "", GREY),
                ("3 best retrieval heads taken out", heads["recall_without_top"], "", BAD),
                ("3 random other heads taken out", heads["recall_without_random"], "mean of the draws", GREY),
            ],
        ),
        (
            "Digits of a passkey recalled, through the cache of smollm2's 90 kv heads",
            [
                ("all kv heads whole", duo["recall_full"], f"perplexity {duo['ppl_full']:.2f}", GREY),
                ("23 whole, chosen by score", duo["recall_duo_25pct"], f"{duo['ppl_duo_25pct']:.2f}, {cache}", GOOD),
                ("9 whole, chosen by score", duo["recall_duo_10pct"], f"{duo['ppl_duo_10pct']:.2f}", GOOD),
                ("23 whole, chosen at random", duo["recall_random_25pct"], "mean of the draws", BAD),
                ("23 whole, the worst by score", duo["recall_inverse_25pct"], f"{duo['ppl_inverse_25pct']:.2f}", BAD),
            ],
        ),
    ]


def svg() -> str:
    """The figure; text is text, fonts are the reader's."""
    parts, y = [], 10
    for title, rows in groups():
        y += 24
        parts.append(f'<text x="12" y="{y}" font-weight="600" fill="{INK}">{title}</text>')
        for label, share, behind, colour in rows:
            y += ROW
            end = LEFT + BAR * (share if share > 0.5 else 1.0) - 8  # inside the bar, or at the end of its track
            parts += [
                f'<text x="{LEFT - 12}" y="{y}" text-anchor="end" fill="{INK}">{label}</text>',
                f'<rect x="{LEFT}" y="{y - 13}" width="{BAR}" height="16" fill="#e5e7eb"/>',
                f'<rect x="{LEFT}" y="{y - 13}" width="{max(2.0, BAR * share):.1f}" height="16" fill="{colour}"/>',
                f'<text x="{LEFT + 8}" y="{y}" fill="{"#fff" if share > 0.2 else INK}" font-weight="600">{share:.2f}</text>',
                f'<text x="{end:.0f}" y="{y}" text-anchor="end" font-size="12" '
                f'fill="{"#fff" if share > 0.5 else GREY}">{behind}</text>',
            ]
        y += 14
    size = f'viewBox="0 0 {WIDTH - 100} {y + 6}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="system-ui, sans-serif" font-size="14">'
    return "\n".join([head, f'<rect width="{WIDTH - 100}" height="{y + 6}" rx="6" fill="#fff"/>', *parts, "</svg>", ""])


def main(arguments: list[str]) -> int:
    """Write or check; the exit code is 1 if a check fails."""
    if arguments not in (["--write"], ["--check"]):
        raise SystemExit(__doc__)
    made = svg()
    if arguments == ["--write"]:
        FIGURE.parent.mkdir(parents=True, exist_ok=True)
        FIGURE.write_text(made, encoding="utf-8")
    stale = not FIGURE.exists() or FIGURE.read_text(encoding="utf-8") != made
    print("docs/assets/measured.svg is out of date; run 'make site-files'" if stale else "the figure is up to date")
    return int(stale)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
