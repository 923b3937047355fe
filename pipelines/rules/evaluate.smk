"""The masks of the annotated slides of the test split, held against their annotations."""


rule evaluate:
    input:
        rules.segment.output,
        truth=lambda wildcards: SLIDES[wildcards.slide_id].annotation,
    output:
        f"{OUT}/evaluate/{{slide_id}}.json",
    log:
        f"{OUT}/logs/evaluate/{{slide_id}}.log",
    params:
        settings=section("config", "evaluate"),
    threads: 1
    resources:
        mem_mb=8000,
        runtime="2h",
    shell:
        "{WSISEG} evaluate {OUT:q}/segment/{wildcards.slide_id:q}.mask.zarr {input.truth:q} "
        "-o {output:q} {CONFIG} > {log:q} 2>&1"
