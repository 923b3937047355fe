"""Fine-tuning on the labelled tiles of every slide that is not in the test split."""


rule finetune:
    input:
        rules.pretrain.output,
        stores=rules.select_stores.output.labelled,
    output:
        f"{OUT}/finetune.json",
    log:
        f"{OUT}/logs/finetune.log",
    params:
        settings=section("config", "finetune"),
    threads: 8
    resources:
        mem_mb=32000,
        runtime="1d",
        gpu=1,
    shell:
        "test -s {input.stores:q} || {{ echo 'error: no slide that could be tiled has labels' "
        "> {log:q}; exit 1; }}; "
        "mapfile -t stores < {input.stores:q}; "
        '{WSISEG} finetune "${{stores[@]}}" -o {OUT:q}/finetune --pretrained {OUT:q}/pretrain '
        "{CONFIG} {OVERWRITE} --json > {output:q} 2> {log:q}"
