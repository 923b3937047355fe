"""The masks of the annotated slides of the test split, held against their annotations."""

import shutil


def truth_of(slide_id):
    """Return the annotation of a slide and its name beside the masks: <slide_id>.<suffix>."""
    path = SLIDES[slide_id].annotation
    suffix = next((s for s in (".geojson.gz", ".geojson") if path.name.endswith(s)), path.suffix)
    return path, f"{slide_id}{suffix}"


# One job, since the figures and their intervals are over all slides: a slide without a mask would
# change them, and stops it.
rule evaluate:
    input:
        expand(rules.segment.output, slide_id=EVALUATED),
        [path for path, _ in map(truth_of, EVALUATED) if path.exists()],
    output:
        f"{OUT}/evaluate.json",
    log:
        f"{OUT}/logs/evaluate.log",
    params:
        settings=section("config", "evaluate"),
    threads: 1
    resources:
        mem_mb=16000,
        runtime="4h",
    run:
        folder = Path(OUT, "evaluate")
        shutil.rmtree(folder, ignore_errors=True)
        for side in ("masks", "truth"):
            (folder / side).mkdir(parents=True)
        for slide_id in EVALUATED:
            mask = f"{slide_id}.mask.zarr"
            (folder / "masks" / mask).symlink_to(Path(OUT, "segment", mask).resolve())
            path, name = truth_of(slide_id)
            if path.exists():
                (folder / "truth" / name).symlink_to(path.resolve())
        shell(
            "{WSISEG} evaluate {folder:q}/masks {folder:q}/truth -o {output:q} {CONFIG} > {log:q} 2>&1"
        )
