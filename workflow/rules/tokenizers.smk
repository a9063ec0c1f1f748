# Tokenizers, and what depends on two of them and text alone.


rule tokenizer:
    input:
        unpack(inputs_of("tokenizers/{tokenizer}/manifest.json")),
    output:
        manifest="<root>/tokenizers/{tokenizer}/manifest.json",
        tokenizer="<root>/tokenizers/{tokenizer}/tokenizer.json",
        tokens="<root>/tokenizers/{tokenizer}/tokens.parquet",
    log:
        "<root>/logs/tokenizer/{tokenizer}.log",
    conda:
        CONDA
    threads: resource("tokenizer", "threads")
    resources:
        mem_mb=resource("tokenizer", "mem_mb"),
        runtime=resource("tokenizer", "runtime"),
    params:
        **part_of_plan("tokenizers/{tokenizer}/manifest.json"),
    shell:
        "python -m stages.tokenizer --root {params.root} --manifest tokenizers/{wildcards.tokenizer}/manifest.json "
        "--spec {params.spec:q} --code {params.code} --lineage {params.lineage} --log {log}"


rule tokenizer_stats:
    input:
        unpack(inputs_of("tokenizer_pairs/{teacher_tokenizer}/{tokenizer}/statistics/{corpus}/manifest.json")),
    output:
        manifest="<root>/tokenizer_pairs/{teacher_tokenizer}/{tokenizer}/statistics/{corpus}/manifest.json",
        counts="<root>/tokenizer_pairs/{teacher_tokenizer}/{tokenizer}/statistics/{corpus}/counts.parquet",
        fertility="<root>/tokenizer_pairs/{teacher_tokenizer}/{tokenizer}/statistics/{corpus}/fertility.parquet",
        coverage="<root>/tokenizer_pairs/{teacher_tokenizer}/{tokenizer}/statistics/{corpus}/coverage.parquet",
        summary="<root>/tokenizer_pairs/{teacher_tokenizer}/{tokenizer}/statistics/{corpus}/summary.json",
        alignments="<root>/tokenizer_pairs/{teacher_tokenizer}/{tokenizer}/statistics/{corpus}/alignments.json",
    log:
        "<root>/logs/tokenizer_stats/{teacher_tokenizer}/{tokenizer}/{corpus}.log",
    conda:
        CONDA
    threads: resource("tokenizer_stats", "threads")
    resources:
        mem_mb=resource("tokenizer_stats", "mem_mb"),
        runtime=resource("tokenizer_stats", "runtime"),
    params:
        **part_of_plan("tokenizer_pairs/{teacher_tokenizer}/{tokenizer}/statistics/{corpus}/manifest.json"),
    shell:
        "python -m stages.tokenizer_stats --root {params.root} --manifest tokenizer_pairs/{wildcards.teacher_tokenizer}/{wildcards.tokenizer}/statistics/{wildcards.corpus}/manifest.json "
        "--spec {params.spec:q} --code {params.code} --lineage {params.lineage} --log {log}"


rule tokenizer_bias:
    input:
        unpack(inputs_of("tokenizer_pairs/{teacher_tokenizer}/{tokenizer}/bias/{corpus}/manifest.json")),
    output:
        manifest="<root>/tokenizer_pairs/{teacher_tokenizer}/{tokenizer}/bias/{corpus}/manifest.json",
        bias="<root>/tokenizer_pairs/{teacher_tokenizer}/{tokenizer}/bias/{corpus}/bias.parquet",
    log:
        "<root>/logs/tokenizer_bias/{teacher_tokenizer}/{tokenizer}/{corpus}.log",
    conda:
        CONDA
    threads: resource("tokenizer_bias", "threads")
    resources:
        mem_mb=resource("tokenizer_bias", "mem_mb"),
        runtime=resource("tokenizer_bias", "runtime"),
    params:
        **part_of_plan("tokenizer_pairs/{teacher_tokenizer}/{tokenizer}/bias/{corpus}/manifest.json"),
    shell:
        "python -m stages.tokenizer_bias --root {params.root} --manifest tokenizer_pairs/{wildcards.teacher_tokenizer}/{wildcards.tokenizer}/bias/{wildcards.corpus}/manifest.json "
        "--spec {params.spec:q} --code {params.code} --lineage {params.lineage} --log {log}"


rule mined_mapping:
    input:
        unpack(inputs_of("tokenizer_pairs/{teacher_tokenizer}/{tokenizer}/mapping/manifest.json")),
    output:
        manifest="<root>/tokenizer_pairs/{teacher_tokenizer}/{tokenizer}/mapping/manifest.json",
        mapping="<root>/tokenizer_pairs/{teacher_tokenizer}/{tokenizer}/mapping/mapping.parquet",
        reverse_mapping="<root>/tokenizer_pairs/{teacher_tokenizer}/{tokenizer}/mapping/reverse.parquet",
        projection="<root>/tokenizer_pairs/{teacher_tokenizer}/{tokenizer}/mapping/projection.parquet",
    log:
        "<root>/logs/mined_mapping/{teacher_tokenizer}/{tokenizer}.log",
    conda:
        CONDA
    threads: resource("mined_mapping", "threads")
    resources:
        mem_mb=resource("mined_mapping", "mem_mb"),
        runtime=resource("mined_mapping", "runtime"),
    params:
        **part_of_plan("tokenizer_pairs/{teacher_tokenizer}/{tokenizer}/mapping/manifest.json"),
    shell:
        "python -m stages.mined_mapping --root {params.root} --manifest tokenizer_pairs/{wildcards.teacher_tokenizer}/{wildcards.tokenizer}/mapping/manifest.json "
        "--spec {params.spec:q} --code {params.code} --lineage {params.lineage} --log {log}"
