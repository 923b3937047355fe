"""One job per slide; a slide that fails is noted, not fatal. Then: which stores to train on."""

import csv
import io


def cohort_row(wildcards):
    """Return the slide as a cohort of its own, with absolute paths."""
    slide = SLIDES[wildcards.slide_id]
    annotation = slide.annotation.resolve() if slide.annotation else ""
    columns = ("slide_id", "patient_id", "path", "mpp", "annotation", "split")
    values = (
        slide.slide_id, slide.patient_id, slide.path.resolve(), slide.mpp, annotation, slide.split
    )  # fmt: skip
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, ["" if v is None else v for v in values]])
    return text.getvalue()


def slide_files(wildcards):
    """Return the files of a slide that exist; a missing one is the slide's failure, not the run's."""
    slide = SLIDES[wildcards.slide_id]
    return [p for p in (slide.path, slide.annotation) if p is not None and p.exists()]


def tiled(notes):
    """Return the rows that `wsiseg tile` printed for the slides, failed ones too."""
    return [row for note in notes for row in json.loads(Path(note).read_text())["results"]]


# The note of a slide is the declared output, not its store: Snakemake makes the folder of an output
# before the job runs, and a store appears at once, by renaming. --overwrite, since Snakemake runs
# the job again only when the slide, its row or the settings have changed, or it was interrupted.
rule tile:
    input:
        slide_files,
    output:
        note=f"{OUT}/tiles/{{slide_id}}.json",
        row=f"{OUT}/cohort/{{slide_id}}.csv",
    log:
        f"{OUT}/logs/tile/{{slide_id}}.log",
    params:
        row=cohort_row,
        settings=section("config", "tile"),
        classes=section("classes"),
    threads: 2
    resources:
        mem_mb=4000,
        runtime="4h",
    shell:
        # Exit 1 with a summary is a slide that failed; anything else ends the job.
        "printf %s {params.row:q} > {output.row:q}; "
        "{WSISEG} tile {output.row:q} -o {OUT:q}/tiles --overwrite {CLASSES} {CONFIG} --json "
        "> {output.note:q} 2> {log:q} || test $? -eq 1 -a -s {output.note:q}"


rule check_tiles:
    """Fail, after everything else was made, if a slide could not be tiled."""
    input:
        expand(rules.tile.output.note, slide_id=SLIDES),
    output:
        touch(f"{OUT}/tiles/complete"),
    run:
        failed = [row for row in tiled(input) if row["status"] == "failed"]
        for row in failed:
            named = row["slide_id"] in row["error"]
            slide = "" if named else f"slide '{row['slide_id']}': "
            print(f"error: {slide}{row['error']}", file=sys.stderr)
        if failed:
            raise WorkflowError(
                f"{len(failed)} of {len(input)} slides were not tiled; the others were used. After "
                f"a repair, delete {OUT}/tiles/{failed[0]['slide_id']}.json to have it tried again"
            )


rule select_stores:
    """List the stores to train on: all slides but the test split's; those with labels."""
    input:
        expand(rules.tile.output.note, slide_id=[i for i in SLIDES if i not in TEST]),
    output:
        unlabelled=f"{OUT}/cohort/pretrain.txt",
        labelled=f"{OUT}/cohort/finetune.txt",
    run:
        rows = [row for row in tiled(input) if row["status"] == "ok"]
        if not rows:
            raise WorkflowError(f"none of {len(input)} slides to train on could be tiled")
        labelled = [row for row in rows if row["labelled_tiles"]]
        for path, chosen in ((output.unlabelled, rows), (output.labelled, labelled)):
            Path(path).write_text("".join(f"{row['output']}\n" for row in chosen))
