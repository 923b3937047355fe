"""Diffusion pretraining on the tiles of every slide that is not in the test split."""


# What the command prints is the declared output, not the network: Snakemake deletes the outputs of a
# job before it runs it again, and a network took days. wsiseg itself sees what is already done.
rule pretrain:
    input:
        rules.select_stores.output.unlabelled,
    output:
        f"{OUT}/pretrain.json",
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
        "mapfile -t stores < {input:q}; "
        '{WSISEG} pretrain "${{stores[@]}}" -o {OUT:q}/pretrain {CONFIG} {OVERWRITE} --json '
        "> {output:q} 2> {log:q}"
