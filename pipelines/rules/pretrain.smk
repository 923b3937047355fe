"""Diffusion pretraining on the tiles of every slide that is not in the test split."""


# model.json is written last. It is the declared output and not the folder, whose resume points
# Snakemake would delete before it runs an interrupted job again.
rule pretrain:
    input:
        stores=rules.select_stores.output.unlabelled,
    output:
        f"{OUT}/pretrain/model.json",
    log:
        f"{OUT}/logs/pretrain.log",
    params:
        settings=section("config", "pretrain"),
    threads: 8
    resources:
        mem_mb=32000,
        runtime="2d",
        gpu=1,
    shell:
        # An array, since thousands of paths do not fit the one string that a shell command is.
        "mapfile -t stores < {input.stores:q}; "
        '{WSISEG} pretrain "${{stores[@]}}" -o {OUT:q}/pretrain {CONFIG} {OVERWRITE} > {log:q} 2>&1'
