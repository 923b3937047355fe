"""One job per slide: slide mask, overlay and the GeoJSON for QuPath, which is written last."""


rule segment:
    input:
        slide_files,
        rules.finetune.output,
        row=rules.tile.output.row,
    output:
        f"{OUT}/segment/{{slide_id}}.geojson",
    log:
        f"{OUT}/logs/segment/{{slide_id}}.log",
    params:
        settings=section("config", "segment"),
    threads: 4
    resources:
        mem_mb=16000,
        runtime="8h",
        gpu=1,
    shell:
        "{WSISEG} segment {input.row:q} --model {OUT:q}/finetune -o {OUT:q}/segment "
        "{CONFIG} {OVERWRITE} > {log:q} 2>&1"
