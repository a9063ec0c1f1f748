# Tokenizers, and what depends on two of them and text alone.


rule tokenizer:
    input:
        unpack(inputs_of("tokenizers/{tokenizer}/manifest.json")),
    output:
        manifest=ROOT + "/tokenizers/{tokenizer}/manifest.json",
        tokenizer=ROOT + "/tokenizers/{tokenizer}/tokenizer.json",
        tokens=ROOT + "/tokenizers/{tokenizer}/tokens.parquet",
    log:
        ROOT + "/logs/tokenizer/{tokenizer}.log",
    conda:
        CONDA
    threads: resource("tokenizer", "threads")
    resources:
        mem_mb=resource("tokenizer", "mem_mb"),
        runtime=resource("tokenizer", "runtime"),
    params:
        **part_of_plan("tokenizers/{tokenizer}/manifest.json"),
    shell:
        "{PYTHON} -m stages.tokenizer --root {ROOT} --manifest tokenizers/{wildcards.tokenizer}/manifest.json "
        "--spec {params.spec:q} --code {params.code} --lineage {params.lineage} --log {log}"


rule tokenizer_stats:
    input:
        unpack(
            inputs_of(
                "tokenizer_pairs/{teacher_tokenizer}/{tokenizer}/statistics/{corpus}/manifest.json"
            )
        ),
    output:
        manifest=ROOT
        + "/tokenizer_pairs/{teacher_tokenizer}/{tokenizer}/statistics/{corpus}/manifest.json",
        counts=ROOT
        + "/tokenizer_pairs/{teacher_tokenizer}/{tokenizer}/statistics/{corpus}/counts.parquet",
        summary=ROOT
        + "/tokenizer_pairs/{teacher_tokenizer}/{tokenizer}/statistics/{corpus}/summary.json",
    log:
        ROOT + "/logs/tokenizer_stats/{teacher_tokenizer}/{tokenizer}/{corpus}.log",
    conda:
        CONDA
    threads: resource("tokenizer_stats", "threads")
    resources:
        mem_mb=resource("tokenizer_stats", "mem_mb"),
        runtime=resource("tokenizer_stats", "runtime"),
    params:
        **part_of_plan(
            "tokenizer_pairs/{teacher_tokenizer}/{tokenizer}/statistics/{corpus}/manifest.json"
        ),
    shell:
        "{PYTHON} -m stages.tokenizer_stats --root {ROOT} --manifest tokenizer_pairs/{wildcards.teacher_tokenizer}/{wildcards.tokenizer}/statistics/{wildcards.corpus}/manifest.json "
        "--spec {params.spec:q} --code {params.code} --lineage {params.lineage} --log {log}"


rule mined_mapping:
    input:
        unpack(
            inputs_of(
                "tokenizer_pairs/{teacher_tokenizer}/{tokenizer}/mapping/manifest.json"
            )
        ),
    output:
        manifest=ROOT
        + "/tokenizer_pairs/{teacher_tokenizer}/{tokenizer}/mapping/manifest.json",
        mapping=ROOT
        + "/tokenizer_pairs/{teacher_tokenizer}/{tokenizer}/mapping/mapping.parquet",
    log:
        ROOT + "/logs/mined_mapping/{teacher_tokenizer}/{tokenizer}.log",
    conda:
        CONDA
    threads: resource("mined_mapping", "threads")
    resources:
        mem_mb=resource("mined_mapping", "mem_mb"),
        runtime=resource("mined_mapping", "runtime"),
    params:
        **part_of_plan(
            "tokenizer_pairs/{teacher_tokenizer}/{tokenizer}/mapping/manifest.json"
        ),
    shell:
        "{PYTHON} -m stages.mined_mapping --root {ROOT} --manifest tokenizer_pairs/{wildcards.teacher_tokenizer}/{wildcards.tokenizer}/mapping/manifest.json "
        "--spec {params.spec:q} --code {params.code} --lineage {params.lineage} --log {log}"
